#!/usr/bin/env bash
# Stage 1: the projector (or resampler) and the summary layer learn from captions; everything else is frozen.
#
#   bash scripts/pretrain.sh                            a tiny model from scratch on captions of the embedded digits
#   MODEL=lmsys/vicuna-7b-v1.5 VISION_TOWER=openai/clip-vit-large-patch14-336 PRESET=sv-llava-100 \
#   DATA=blip_laion_cc_sbu_558k.json IMAGES=images OUTPUT=checkpoints/pretrain bash scripts/pretrain.sh
#
# Variables and arguments are those of finetune_skip.sh; with MODEL the defaults are LLaVA's: 32 samples a process,
# learning rate 1e-3. What comes out is a whole model: MODEL=checkpoints/pretrain of finetune_skip.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh

if [ -z "${DATA:-}" ]; then
    $PYTHON -m playground.data.build
    export DATA=playground/data/digits/captions.json IMAGES=playground/data/digits/images
fi
if [ -n "${MODEL:-}" ]; then
    export BATCH=${BATCH:-32} LR=${LR:-1e-3}
fi
export TEMPLATE=${TEMPLATE:-plain} OUTPUT=${OUTPUT:-checkpoints/pretrain}
exec bash scripts/finetune_skip.sh --train_parts multi_modal_projector summary "$@"
