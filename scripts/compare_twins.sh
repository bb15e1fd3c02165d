#!/usr/bin/env bash
# LLaVA-HD and chain of sight, dense against skipping, on the embedded data: twelve runs of 1400 steps, three seeds each.
# As in the paper the tower and the language model are trained before (here those of the dense `llava`); projector,
# resampler and summaries are new. Training digits are turned and moved twice as far as by default.
#
#   bash scripts/compare_twins.sh                 about three hours on 2 cores; what is finished is not repeated
#   PRESETS="cos sv-cos" SEEDS="42" STEPS=700 bash scripts/compare_twins.sh
#
# Variables: PRESETS (pairs, the dense one first), SEEDS, STEPS, BENCHMARKS, START (a trained dense llava; trained if it
# is not there), WORK (folder of it all), NPROC.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh

PRESETS=${PRESETS:-llava-hd sv-llava-hd cos sv-cos}
SEEDS=${SEEDS:-42 43 44}
STEPS=${STEPS:-1400}
BENCHMARKS=${BENCHMARKS:-mmstar,mmbench,gqa,pope,textvqa}
WORK=${WORK:-checkpoints/twins}
START=${START:-$WORK/llava}
digits=$WORK/data

[ -f "$START/config.json" ] || PRESET=llava OUTPUT=$START bash scripts/finetune_skip.sh
"$PYTHON" -m playground.data.build --output "$digits" --poses 2
MODELS=()
for preset in $PRESETS; do
    for seed in $SEEDS; do
        new=$WORK/new/$preset-$seed
        [ -f "$new/config.json" ] ||
            "$PYTHON" -m llava_skip.convert "$START" "$new" --preset "$preset" --new-projector tiny --seed "$seed"
        RECIPE=embedded MODEL=$new PRESET=$preset DATA=$digits/train.json IMAGES=$digits/images NPROC=${NPROC:-1} \
            BATCH=$((16 / ${NPROC:-1})) LR=5e-4 OUTPUT=$WORK/runs/$preset/seed-$seed bash scripts/finetune_skip.sh \
            --train_parts vision_tower multi_modal_projector summary language_model --max_steps "$STEPS" --seed "$seed"
    done
    MODELS+=(--model "$WORK/runs/$preset")
done
"$PYTHON" -m eval.run "${MODELS[@]}" --benchmarks "$BENCHMARKS" --output "$WORK/results"
set -- $PRESETS
while [ $# -ge 2 ]; do
    "$PYTHON" -m eval.compare --models "$1" "$2" --results "$WORK/results" --json "$WORK/results/$1-$2.json"
    shift 2
done
