"""LoRA and QLoRA through PEFT: factors in the language model only; projector and summary layer are trained in full.

The vision tower has layers of the same names as the language model, so targets are given by their whole names.
"""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip_base.errors import UserError

if TYPE_CHECKING:
    from train.arguments import ModelArguments

_LAYERS = r"model\.language_model\.layers\.\d+\."
_FULL_PRECISION = ["model.vision_tower", "model.multi_modal_projector", "model.summary", "lm_head"]


def check_lora(arguments: ModelArguments) -> None:
    """What LoRA and quantisation need, before any weight is loaded.

    Raises:
        UserError: says what to give instead.
    """
    if arguments.lora_enable and arguments.model is None:
        raise UserError("--lora_enable adapts a pretrained model: name it with --model.")
    if arguments.lora_enable and "language_model" not in arguments.trained_parts:
        raise UserError("--lora_enable adapts the language model, which --train_parts leaves out: add language_model.")
    if arguments.bits == 16:
        return
    if not arguments.lora_enable:
        raise UserError(f"--bits {arguments.bits}: quantised weights cannot be trained; add --lora_enable true.")
    if arguments.vision_tower or arguments.projector:
        raise UserError(
            f"--bits {arguments.bits} needs a saved llava-skip model: join language model, tower and projector first "
            f"with llava-skip convert {arguments.model} JOINED --vision-tower TOWER, then --model JOINED."
        )
    if is_deepspeed_zero3_enabled():
        raise UserError(f"--bits {arguments.bits} does not work with ZeRO-3, which partitions weights: use ZERO=2.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--bits {arguments.bits} needs bitsandbytes: pip install bitsandbytes.")


def linear_layers(model: nn.Module) -> set[str]:
    """Last names of the linear layers in the language model's decoder, such as `q_proj`."""
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.match(_LAYERS, name)
    }


def check_targets(model: nn.Module, arguments: ModelArguments) -> None:
    """Every name in --lora_targets must be a linear layer of the language model; the model may be on the meta device.

    Raises:
        UserError: names the unknown ones and the known.
    """
    known = linear_layers(model)
    if unknown := sorted(set(arguments.lora_targets or ()) - known):
        raise UserError(
            f"--lora_targets has {unknown}; linear layers of the language model are {', '.join(sorted(known))}."
        )


def quantization_config(arguments: ModelArguments, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How bitsandbytes stores the language model; None for 16 bits. Tower, projector, summary and head stay whole."""
    if arguments.bits == 16:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=arguments.bits == 4,
        load_in_8bit=arguments.bits == 8,
        llm_int8_skip_modules=_FULL_PRECISION,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=arguments.quant_type,
        bnb_4bit_use_double_quant=arguments.double_quant,
    )


def add_lora(
    model: LlavaSkipForConditionalGeneration, arguments: ModelArguments, gradient_checkpointing: bool = False
) -> PeftModel:
    """The model with low-rank factors in the language model's linear layers; other trainable parts are trained in full.

    Those parts are in PEFT's `modules_to_save`, so that one adapter file has everything that was trained.
    """
    if arguments.bits != 16:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
    targets = "|".join(sorted(arguments.lora_targets or linear_layers(model)))
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        bias="lora_only" if arguments.lora_bias == "lora_only" else "none",
        target_modules=rf"{_LAYERS}.*\.({targets})",
        modules_to_save=[f"model.{part}" for part in arguments.trained_parts if _has(model, part)],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _has(model: LlavaSkipForConditionalGeneration, part: str) -> bool:
    """Whether a part is a module that is trained in full; a dense model has no summary layer."""
    return part != "language_model" and getattr(model.model, part) is not None
