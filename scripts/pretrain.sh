#!/usr/bin/env bash
# Stage 1: the projector (or resampler) and the summary layer are trained on captions; everything else is frozen.
#
#   bash scripts/pretrain.sh                            a tiny model from scratch on captions of the embedded digits
#   MODEL=lmsys/vicuna-7b-v1.5 VISION_TOWER=openai/clip-vit-large-patch14-336 PRESET=sv-llava-100 \
#   DATA=blip_laion_cc_sbu_558k.json IMAGES=images OUTPUT=checkpoints/pretrain bash scripts/pretrain.sh
#
# Variables and arguments are the same as in finetune_skip.sh; with MODEL the defaults are LLaVA's: 32 samples a
# process, learning rate 1e-3. The result is a whole model: MODEL=checkpoints/pretrain of finetune_skip.sh.
set -euo pipefail
[ -n "${RECIPE:-}" ] || export ZERO=${ZERO:-2}
export OUTPUT=${OUTPUT:-checkpoints/pretrain} RECIPE=${RECIPE:-$([ -n "${MODEL:-}" ] && echo pretrain || echo embedded-pretrain)}
exec bash "$(dirname "$0")/finetune_skip.sh" "$@"
