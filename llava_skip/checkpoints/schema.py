"""A config.json may come from anybody: what is checked of it before transformers makes a configuration of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json
from llava_skip_base.texts import shortened

Config = TypeVar("Config", bound=PreTrainedConfig)

_LARGEST = 100_000_000
_SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings"}
_SIZES |= {"image_size", "patch_size", "num_channels", "projection_dim", "image_seq_length", "max_tiles"}
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "sliding_window", "pretraining_tp")
_MOST_LAYERS = 1000
"""Far more than any model has; a model is laid out layer by layer before it is compared with the weights."""
_NEVER_FROM_A_FILE = ("id2label", "label2id", "num_labels", "problem_type", "per_layer_config", "quantization_config")
"""Fields of a configuration that mean nothing here."""
_OLD_NAMES = ("rope_scaling", "torch_dtype")
"""Fields that transformers reads under a new name."""


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder, checked as `check_config` does.

    Raises:
        MissingFileError: there is none.
        UserError: it is not JSON, or a value cannot be meant.
    """
    path = folder / "config.json"
    raw = read_json(path)
    check_config(raw, str(path))
    return raw


def check_config(raw: Any, where: str) -> None:
    """Check the values that decide how large a model is, and by which function something is computed.

    Args:
        raw: a config.json, or the part of one for the language model or the tower.
        where: what it is, for messages.

    Raises:
        UserError: names the value.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where} is {shortened(repr(raw))}; it must be an object with the fields of a model.")
    for name, value in raw.items():
        if expected := _fault(name, value):
            raise UserError(f"{where} has {name} {shortened(repr(value))}; it must be {expected}.")
    for part, whole in (("patch_size", "image_size"), ("num_key_value_heads", "num_attention_heads")):
        if raw.get(part) and raw.get(whole) and raw[part] > raw[whole]:
            raise UserError(f"{where} has {part} {raw[part]}; it must be at most {whole}, which is {raw[whole]}.")
    for name in ("text_config", "vision_config"):
        if raw.get(name) is not None:
            check_config(raw[name], f"{name} of {where}")


def _fault(name: str, value: Any) -> str | None:
    """What a value should be; None if it can be meant, or is of no interest."""
    if callable(getattr(PreTrainedConfig, name, None)):
        return "left out: a field may not take the place of a method"
    if isinstance(value, dict) and _has_odd_dtype(value):
        return "an object in which each dtype is a text"
    if name in _SIZES or name in _OPTIONAL_SIZES:
        fits = _is_count(value, 1, _LARGEST) or (value is None and name in _OPTIONAL_SIZES)
        return None if fits else f"a whole number from 1 to {_LARGEST}"
    if name == "num_hidden_layers":
        return None if _is_count(value, 1, _MOST_LAYERS) else f"a whole number from 1 to {_MOST_LAYERS}"
    if name == "model_type":
        return None if value is None or isinstance(value, str) else "a text"
    if name == "architectures":
        is_list = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        return None if value is None or is_list else "a list of texts"
    if name in ("hidden_act", "projector_hidden_act"):
        return None if isinstance(value, str) and value in ACT2FN else f"one of {', '.join(ACT2FN)}"
    if name in ("dtype", "torch_dtype"):
        known = value is None or (isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype))
        return None if known else "the name of a number format of torch, such as float32"
    if name in ("skip", "resampler", "reduction"):
        return None if value is None or isinstance(value, dict) else "an object of numbers, or null"
    if name == "front_end":
        return None if isinstance(value, str) else "the name of a front end"
    if name in ("rope_parameters", "rope_scaling"):
        return _rope_fault(value)
    if name == "rope_theta":
        return None if _is_positive(value) else "a positive number"
    return None


def _has_odd_dtype(value: dict[str, Any]) -> bool:
    """Whether an object, or one in it, has a `dtype` that transformers cannot show in its messages."""
    odd = not isinstance(value.get("dtype"), (str, int, dict, type(None)))
    return odd or any(_has_odd_dtype(part) for part in value.values() if isinstance(part, dict))


def _rope_fault(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        return "an object with a rope_type"
    kinds = {value.get("rope_type", "default"), value.get("type", "default")} if _are_texts(value) else {None}
    if not kinds <= {"default", *ROPE_INIT_FUNCTIONS}:
        return f"an object with the rope_type default, {', '.join(ROPE_INIT_FUNCTIONS)}"
    needed = ("rope_theta", "factor", "original_max_position_embeddings")
    if not all(_is_positive(value[name]) for name in needed if name in value):
        return f"an object with positive numbers as {', '.join(needed)}"
    return None


def _are_texts(rope: Mapping[str, Any]) -> bool:
    return all(isinstance(rope.get(name, ""), str) for name in ("rope_type", "type"))


def _is_count(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 < value < 1e18


def make_config(kind: type[Config], fields: Mapping[str, Any], where: str) -> Config:
    """A configuration of a class of transformers, of fields that `check_config` has seen.

    Raises:
        UserError: a field of another type, or fields that do not fit each other.
    """
    known = {
        name: value
        for name, value in fields.items()
        # Extra fields become attributes: none may take the place of what a class has for all of its objects.
        if name not in _NEVER_FROM_A_FILE
        and (name in kind.__dataclass_fields__ or name in _OLD_NAMES or not hasattr(kind, name))
    }
    try:
        return kind(**known)
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where} holds no configuration of a {kind.model_type} model: {shortened(reason)}") from error
