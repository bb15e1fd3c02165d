#!/usr/bin/env bash
# Fine-tunes a LLaVA whose visual tokens skip the FFN, with DeepSpeed.
#
#   bash scripts/finetune_skip.sh                       a tiny model on the embedded digits, two CPU processes or all GPUs
#   PRESET=llava bash scripts/finetune_skip.sh          the dense model, on the same data
#   MODEL=... DATA=... IMAGES=... OUTPUT=... bash scripts/finetune_skip.sh --learning_rate 1e-5
#
# Variables (each has a default; arguments behind the script go to train.train, see --help):
#   MODEL        saved model, or a language model together with VISION_TOWER    (a new tiny model)
#   VISION_TOWER CLIP vision tower for a plain language model
#   DATA IMAGES  data and the folder of its pictures, see docs/data.md          (the embedded digits)
#   PRESET       llava, sv-llava-64, sv-llava-100, sv-llava-256, llava-hd, sv-llava-hd,
#                cos, cos-336, cos-80, sv-cos                                   (sv-llava-256 for a new model)
#   TEMPLATE     v1, llama3, plain, ...; docs/data.md has all of them           (the tokenizer's own)
#   OUTPUT       folder of the run                                              (checkpoints/<preset>)
#   NPROC        processes on this machine                                      (GPUs found, else 2)
#   ZERO         DeepSpeed stage: 2, 3, 2_offload or 3_offload                  (2)
#   EPOCHS BATCH LR   epochs, samples a process and step, learning rate
#   TORCHRUN     options of torchrun that join several machines                 (--standalone; scripts/slurm sets them)
#   DRY_RUN      not empty: print the command, and do not run it
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh

gpus=$($PYTHON -c 'import torch; print(torch.cuda.device_count())')
NPROC=${NPROC:-$((gpus > 0 ? gpus : 2))}
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || { echo "error: NPROC is '$NPROC'; it must be a number of processes, 1 or more." >&2; exit 2; }
ZERO=${ZERO:-2}
[ -f "scripts/zero$ZERO.json" ] || { echo "error: ZERO is '$ZERO'; it must be 2, 3, 2_offload or 3_offload." >&2; exit 2; }

arguments=(--deepspeed "scripts/zero$ZERO.json")
if [ "$gpus" -gt 0 ]; then
    arguments+=(--bf16 true --tf32 true)
else
    arguments+=(--use_cpu true --dataloader_pin_memory false)
    export DS_ACCELERATOR=cpu
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}
fi
if [ -z "${DATA:-}" ]; then
    $PYTHON -m playground.data.build
    DATA=playground/data/digits/train.json
    IMAGES=playground/data/digits/images
fi
if [ -z "${MODEL:-}" ]; then # a tiny model from scratch: it learns as small models do
    PRESET=${PRESET:-sv-llava-256}
    BATCH=${BATCH:-$((16 / NPROC > 0 ? 16 / NPROC : 1))}
    LR=${LR:-8e-4}
    arguments+=(--adam_beta2 0.99)
else
    arguments+=(--model "$MODEL" --activation_checkpointing true)
fi
[ -z "${VISION_TOWER:-}" ] || arguments+=(--vision_tower "$VISION_TOWER")
[ -z "${PRESET:-}" ] || arguments+=(--preset "$PRESET")
[ -z "${TEMPLATE:-}" ] || arguments+=(--template "$TEMPLATE")
[ -z "${BATCH:-}" ] || arguments+=(--per_device_train_batch_size "$BATCH")
[ -z "${LR:-}" ] || arguments+=(--learning_rate "$LR")

read -r -d '' -a torchrun <<<"${TORCHRUN:---standalone}" || true
command=("$PYTHON" -m train.launch "${torchrun[@]}" --nproc_per_node "$NPROC" -m train.train
    "${arguments[@]}"
    --data "$DATA" --images "${IMAGES:-}"
    --output_dir "${OUTPUT:-checkpoints/${PRESET:-finetuned}}"
    --num_train_epochs "${EPOCHS:-1}"
    "$@")
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}" && echo
    exit
fi
exec "${command[@]}"
