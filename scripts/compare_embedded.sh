#!/usr/bin/env bash
# Trains the dense and the skipping model on the embedded data, same steps and seed, evaluates both on all of its
# benchmarks, and writes docs/embedded.md (PAGE= names another file). PRESETS="llava sv-llava-100 ..." chooses others;
# the first is the reference.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh

PRESETS=${PRESETS:-llava sv-llava-256}
CHECKPOINTS=${CHECKPOINTS:-checkpoints/compare}
RESULTS=${RESULTS:-results/compare}
PAGE=${PAGE:-docs/embedded.md}
for preset in $PRESETS; do
    PRESET=$preset OUTPUT=$CHECKPOINTS/$preset bash scripts/finetune_skip.sh "$@"
    for benchmark in mmstar mmbench; do
        "$PYTHON" -m eval.run --benchmark "$benchmark" --model "$CHECKPOINTS/$preset" \
            --output "$RESULTS/$benchmark/$preset"
    done
done
"$PYTHON" scripts/results_table.py --checkpoints "$CHECKPOINTS" --results "$RESULTS" --presets "$PRESETS" --output "$PAGE"
