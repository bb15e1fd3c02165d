#!/usr/bin/env bash
# Trains the dense and the skipping model on the embedded data, same steps and seed, evaluates both on its benchmarks,
# and writes docs/embedded.md (PAGE= names another file). PRESETS="llava-hd sv-llava-hd cos sv-cos" chooses others, the
# dense one of an architecture first.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh

PRESETS=${PRESETS:-llava sv-llava-256}
CHECKPOINTS=${CHECKPOINTS:-checkpoints/compare}
RESULTS=${RESULTS:-results/compare}
PAGE=${PAGE:-docs/embedded.md}
MODELS=()
for preset in $PRESETS; do
    PRESET=$preset OUTPUT=$CHECKPOINTS/$preset bash scripts/finetune_skip.sh "$@"
    MODELS+=(--model "$CHECKPOINTS/$preset")
done
"$PYTHON" -m eval.run "${MODELS[@]}" --output "$RESULTS"
"$PYTHON" eval/study/embedded.py --checkpoints "$CHECKPOINTS" --results "$RESULTS" --presets "$PRESETS" --output "$PAGE"
