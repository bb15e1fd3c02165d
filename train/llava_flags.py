"""LLaVA's own flag names, as a table: which argument they mean here, or what to use instead.

Sources: haotian-liu/LLaVA (llava/train/train.py, scripts/v1_5) and the paper's fork of it. Names that mean the same in
both, such as `--bf16` or `--lora_r`, need no row. Two are of transformers, which many scripts give with LLaVA's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import NamedTuple

from llava_skip.conversation import LLAVA_VERSIONS
from llava_skip_base.errors import UserError

EPILOG = "LLaVA's own flag names (--model_name_or_path, --data_path, --version, ...) work, too: see docs/training.md."


class Renamed(NamedTuple):
    """A flag with another name here; `values` are the values that also have another name."""

    name: str
    ours: str
    values: tuple[tuple[str, str], ...] = ()


class Settled(NamedTuple):
    """A flag that is accepted with these values only; the message for another one says what to use `instead`."""

    name: str
    values: tuple[str, ...]
    instead: str


class Part(NamedTuple):
    """A switch of the trainable parts: from the parts that are trainable without it to those with it."""

    name: str
    parts: Callable[[tuple[str, ...]], tuple[str, ...]]


class Rate(NamedTuple):
    """The learning rate of a part."""

    name: str
    part: str


_OFF, _ANY_SWITCH = ("false",), ("true", "false")
_PROJECTOR = ("multi_modal_projector", "summary")

FLAGS: tuple[Renamed | Settled | Part | Rate, ...] = (
    Renamed("model_name_or_path", "model"),
    Renamed("version", "template", tuple(LLAVA_VERSIONS.items())),
    Renamed("data_path", "data"),
    Renamed("image_folder", "images"),
    Renamed("model_max_length", "max_length"),
    Renamed("pretrain_mm_mlp_adapter", "projector"),
    Renamed("warmup_ratio", "warmup_steps"),
    Renamed("evaluation_strategy", "eval_strategy"),
    Renamed("gradient_checkpointing", "activation_checkpointing"),
    Part("tune_mm_mlp_adapter", lambda parts: _PROJECTOR),
    Part("freeze_mm_mlp_adapter", lambda parts: tuple(p for p in parts if p != "multi_modal_projector")),
    Part("freeze_backbone", lambda parts: tuple(p for p in parts if p != "language_model")),
    Part("unfreeze_mm_vision_tower", lambda parts: ("vision_tower", *parts)),
    Rate("mm_projector_lr", "multi_modal_projector"),
    Rate("mm_vision_tower_lr", "vision_tower"),
    Settled("mm_projector_type", ("mlp2x_gelu",), "--preset cos for the resampler; the others are not built"),
    Settled("mm_vision_select_layer", ("-2",), "vision_feature_layer in the config.json of a saved --model"),
    Settled("mm_vision_select_feature", ("patch",), "vision_feature_select_strategy in the config.json of --model"),
    Settled("mm_patch_merge_type", ("flat",), "--preset llava-hd for images in tiles"),
    Settled("mm_use_im_start_end", _OFF, "false: images have no tokens around them"),
    Settled("mm_use_im_patch_token", _OFF, "false: the image token is <image>"),
    Settled("is_multimodal", ("true",), "true: what a record holds decides"),
    Settled("lazy_preprocess", _ANY_SWITCH, "either: records are always encoded when they are read"),
    Settled("save_safetensors", ("true",), "true: weights are safetensors"),
    Settled("group_by_length", _OFF, "--group_by_modality_length true"),
    Settled("metric_for_best_model", ("loss", "eval_loss"), "loss: of the validation data"),
    Settled("greater_is_better", _OFF, "false: the lowest validation loss is the best"),
    Settled("lora_weight_path", ("",), "--model with the merged adapter (llava-skip merge-lora)"),
    Settled("cache_dir", (), "the environment variable HF_HOME"),
    Settled("mpt_attn_impl", (), "another language model: MPT is not built"),
    Settled("use_hd", _OFF, "--preset llava-hd or sv-llava-hd"),
    Settled("use_zip", _OFF, "--preset sv-llava-100, or another that skips"),
    Settled("cos_config_version", (), "--preset cos, cos-336, cos-80 or sv-cos"),
    Settled("cos_highres_extension_version", ("none",), "llava-skip extend"),
    Settled("backbone_resolution", (), "--preset; it sets the image size"),
    Settled("load_vision_tower_weight", (), "--projector; a tower in that file is read"),
    Settled("hd_data_type", (), "--preset llava-hd; records without images need nothing"),
    Settled("is_pretrain", (), "--images with the folder"),
    Settled("path_conversion", (), "`renames` of a mixture, see docs/data.md"),
    Settled("vision_weight_decay", ("0", "0.0"), "--weight_decay, which is for all parts"),
    Settled("layerwise_decay", ("0", "0.0"), "--learning_rates with one rate for the tower"),
    Settled("lr_scale", (), "--learning_rates with one rate for the tower"),
)
"""Flags of LLaVA that are not arguments here. A new one needs a row in this table only."""


def plain_name(flag: Renamed | Settled | Part | Rate) -> str:
    """The argument here that a flag of LLaVA sets."""
    if isinstance(flag, Renamed):
        return flag.ours
    return {Part: "train_parts", Rate: "learning_rates"}.get(type(flag), flag.name)


def translate(command_line: list[str]) -> list[str]:
    """A command line in which LLaVA's flags are replaced by the arguments that they mean.

    Raises:
        UserError: a flag with a value that cannot be honoured (with what to use), or given twice under two names.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for flag in FLAGS:
        parser.add_argument(f"--{flag.name}", nargs="?", const="true")
    found, ours = parser.parse_known_args(command_line)
    given = {flag: getattr(found, flag.name) for flag in FLAGS if hasattr(found, flag.name)}
    for flag, value in given.items():
        if isinstance(flag, Settled) and value.lower() not in flag.values:
            raise UserError(f"--{flag.name} {value} is not taken. Use {flag.instead}.")
    renamed = {flag: value for flag, value in given.items() if isinstance(flag, Renamed)}
    made = {f"--{flag.ours}": [dict(flag.values).get(value, value)] for flag, value in renamed.items()}
    made |= _parts({flag: value for flag, value in given.items() if isinstance(flag, Part)})
    if rates := _rates({flag: value for flag, value in given.items() if isinstance(flag, Rate)}):
        made["--learning_rates"] = [json.dumps(rates)]
    if twice := sorted(name for name in made if any(word.partition("=")[0] == name for word in ours)):
        raise UserError(
            f"{', '.join(twice)} is given twice, once by its name in LLaVA: use the name here alone, whose last value "
            "counts (scripts/finetune_skip.sh gives some arguments itself)."
        )
    return [*ours, *(word for name, values in made.items() for word in (name, *values))]


def _parts(switches: dict[Part, str]) -> dict[str, list[str]]:
    """`--train_parts` of the switches that are on, applied one after the other; nothing if none is."""
    parts: tuple[str, ...] = (*_PROJECTOR, "language_model")
    for switch, value in switches.items():
        if value.lower() not in _ANY_SWITCH:
            raise UserError(f"--{switch.name} is {value!r}; it must be true or false.")
    on = [switch for switch, value in switches.items() if value.lower() == "true"]
    for switch in on:
        parts = switch.parts(parts)
    return {"--train_parts": list(dict.fromkeys(parts))} if on else {}


def _rates(given: dict[Rate, str]) -> dict[str, float]:
    """Part -> learning rate; LLaVA's own default is None."""
    rates = {}
    for flag, value in given.items():
        if value == "None":
            continue
        try:
            rates[flag.part] = float(value)
        except ValueError as error:
            raise UserError(f"--{flag.name} is {value!r}; it must be a number.") from error
    return rates
