"""Arguments of the forwards that stock LLaVA takes, or that nobody knows: honoured, or refused by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils.generic import TransformersKwargs

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.vision import get_front_end
from llava_skip_base.errors import UserError

KNOWN = {
    *TransformersKwargs.__annotations__,
    *("token_type_ids", "mm_token_type_ids"),  # processors add them; they say nothing that the ids do not say
    "attention_instances",  # what an engine puts in place of each layer's attention
}
"""Arguments that are handed on to the language model or the tower."""

FEATURES = ("vision_feature_layer", "vision_feature_select_strategy")
"""Arguments that choose among the tower's features."""


def read_arguments(config: LlavaSkipConfig, arguments: dict[str, Any]) -> LlavaSkipConfig:
    """As `features_config`; what is left of the arguments must be known.

    Raises:
        UserError: nothing would read one of them.
    """
    config = features_config(config, arguments)
    unknown = sorted(name for name, value in arguments.items() if value is not None and name not in KNOWN)
    if unknown:
        raise UserError(f"The model does not take {', '.join(unknown)}: leave it out, or correct its name.")
    return config


def features_config(config: LlavaSkipConfig, arguments: dict[str, Any]) -> LlavaSkipConfig:
    """The configuration for one call that asks for other features of the tower, as stock LLaVA's forward can.

    Args:
        config: of the model.
        arguments: of the call; `vision_feature_layer` and `vision_feature_select_strategy` are taken out.

    Raises:
        UserError: the front end has no such choice, or the configuration would be refused.
    """
    chosen = {name: arguments.pop(name, None) for name in FEATURES}
    changed = {name: value for name, value in chosen.items() if value not in (None, getattr(config, name))}
    if not changed:
        return config
    if not get_front_end(config.front_end).reads_one_layer:
        raise UserError(f"front_end {config.front_end!r} has its own choice of layers: leave out {', '.join(changed)}.")
    return type(config).from_dict(config.to_dict() | changed)


def check_whole_mask(mask: Any, cache: Cache | None, num_new: int) -> None:
    """Raise UserError if a 2-D mask is not one of all tokens, those in the cache included."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return
    seen = 0 if cache is None else int(cache.get_seq_length())
    if mask.shape[1] != seen + num_new:
        raise UserError(
            f"attention_mask has {mask.shape[1]} columns for {seen} tokens in the cache and {num_new} new ones: give "
            f"the whole mask, of {seen + num_new} columns."
        )
