#!/usr/bin/env bash
# Fine-tunes a LLaVA whose visual tokens skip the FFN, with DeepSpeed.
#
#   bash scripts/finetune_skip.sh                       a tiny model on the embedded digits, two CPU processes or all GPUs
#   PRESET=llava bash scripts/finetune_skip.sh          the dense model, on the same data
#   MODEL=... DATA=... IMAGES=... OUTPUT=... bash scripts/finetune_skip.sh --learning_rate 1e-5
#
# Variables (each has a default; arguments of the script go to the trainer, `llava-skip train --help` lists them):
#   RECIPE       of train/recipes                               (finetune with MODEL, embedded without)
#   MODEL        saved model, or a language model together with VISION_TOWER    (a new tiny model)
#   VISION_TOWER CLIP vision tower for a plain language model
#   DATA IMAGES  data and the folder of its images, see docs/data.md            (the embedded digits)
#   PRESET       README.md has the table                        (the model's own; sv-llava-256 for a new one)
#   TEMPLATE     v1, llama3, plain, ...; docs/data.md has all of them           (the tokenizer's own)
#   OUTPUT       folder of the run                                              (checkpoints/<preset>)
#   NPROC        processes on this machine                                      (GPUs found, else 2)
#   ZERO         DeepSpeed stage: 2, 3, 2_offload or 3_offload                  (2, or RECIPE's)
#   EPOCHS BATCH LR   epochs, samples a process and step, learning rate
#   TORCHRUN     options of torchrun that join several machines                 (--standalone; scripts/slurm sets them)
#   DRY_RUN      if not empty: print the command instead of running it
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh

[ -n "${RECIPE:-}" ] || ZERO=${ZERO:-2}
[ -z "${ZERO:-}" ] || [ -f "scripts/zero$ZERO.json" ] || { echo "error: ZERO is '$ZERO'; it must be 2, 3, 2_offload or 3_offload." >&2; exit 2; }
arguments=(${ZERO:+--deepspeed "scripts/zero$ZERO.json"} --recipe "${RECIPE:-$([ -n "${MODEL:-}" ] && echo finetune || echo embedded)}")
[ -z "${DATA:-}" ] || arguments+=(--data "$DATA" --images "${IMAGES:-}")
while read -r flag value; do
    [ -z "$value" ] || arguments+=("--$flag" "$value")
done <<END
model ${MODEL:-}
vision_tower ${VISION_TOWER:-}
preset ${PRESET:-}
template ${TEMPLATE:-}
per_device_train_batch_size ${BATCH:-}
learning_rate ${LR:-}
num_train_epochs ${EPOCHS:-}
output_dir ${OUTPUT:-}
END
exec "$PYTHON" -m train.launch "${arguments[@]}" "$@"
