"""From a configuration and a forward to what runs its decoder layers, and the caches that fit.

Shapes: B batch, T new tokens of a sample, K tokens before them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from llava_skip.arguments import check_whole_mask
from llava_skip.cache import ForgettingCache
from llava_skip.configuration import LlavaSkipConfig
from llava_skip.head_rows import OF_PACKED
from llava_skip.masking import is_two_dimensional
from llava_skip.reduction.cache import StagedCache
from llava_skip.reduction.config import ReductionConfig
from llava_skip.reduction.frozen import FrozenTokens
from llava_skip.reduction.in_decoder import Cut, DropRule
from llava_skip.reduction.shortv import FreezeRule
from llava_skip.reduction.stages import PromptTokens, Stages
from llava_skip.routing import ImageTokens, LayerRunner, Route
from llava_skip_base.errors import UserError


@lru_cache(maxsize=64)
def _cuts(reduction: ReductionConfig, layers: int, tokens: int) -> tuple[Cut, ...]:
    rule = reduction.rule
    return rule.cuts(reduction, layers, tokens) if isinstance(rule, DropRule) else ()


def cuts_of(config: LlavaSkipConfig) -> tuple[Cut, ...]:
    """Where a model drops image tokens between its layers; empty if it does not."""
    reduction = config.reduction_config
    if reduction is None or not reduction.rule.in_decoder:
        return ()
    return _cuts(reduction, config.text_config.num_hidden_layers, config.visual_tokens(1))


def own_cache(config: LlavaSkipConfig) -> Cache | None:
    """An empty cache of the kind that a model needs; None if transformers' own does."""
    if config.forgets:
        return ForgettingCache()
    return StagedCache() if cuts_of(config) else None


def new_cache(config: LlavaSkipConfig) -> Cache:
    """An empty cache for a model."""
    own = own_cache(config)
    return DynamicCache(config=config.text_config) if own is None else own


def make_runner(
    config: LlavaSkipConfig,
    language_model: Any,
    route: Route,
    images: ImageTokens | None,
    mask: Any,
    supervised: Tensor | None = None,
) -> LayerRunner | None:
    """What runs the layers of one forward; None where the route does.

    Args:
        config: of the model.
        language_model: has the text configuration and the rotary embedding.
        route: of the forward.
        images: where its image tokens are; None in a decode step.
        mask: [B, K + T] of the forward; None if nothing is padded.
        supervised: [B, T] bool, the tokens whose next one has a label; None without labels.
    """
    reduction, cuts = config.reduction_config, cuts_of(config)
    if reduction is None or not reduction.rule.in_decoder:
        return None
    # A rank that trains on text alone must call the same modules as the others: ZeRO's collective calls follow them.
    has_images = images is not None and (language_model.training or _any_new(images))
    if isinstance(rule := reduction.rule, FreezeRule):
        if images is None or not has_images:
            return None
        moving = ~images.in_new if route.real is None else ~images.in_new & route.real
        layers = rule.frozen(reduction, config.text_config.num_hidden_layers)
        return FrozenTokens(layers, language_model.config, moving, route.ffn_tokens, route.head)
    if not cuts:
        return None
    prompt = None
    if images is not None:
        real = torch.ones_like(images.in_new) if route.real is None else route.real
        prompt = PromptTokens(images.in_new, real, supervised, images.generated)
    return Stages(reduction, cuts, language_model, prompt, has_images, route.ffn_tokens, mask, route.head)


def _any_new(images: ImageTokens) -> bool:
    return bool(images.in_new.any() if images.counts is None else images.counts.image)


def restored(outputs: BaseModelOutputWithPast, runner: LayerRunner | None) -> BaseModelOutputWithPast:
    """What the language model gave, with all tokens of the forward."""
    if runner is not None:
        outputs.last_hidden_state = runner.restore(outputs.last_hidden_state)
    return outputs


def check_forward(
    config: LlavaSkipConfig,
    cache: Cache | None,
    mask: Any,
    position_ids: Tensor | None,
    new: int,
    arguments: dict[str, Any],
) -> None:
    """Raise UserError for a mask of another length, or a forward in which tokens cannot be dropped between layers.

    Args:
        config: of the model.
        cache: of the forward.
        mask: its attention mask.
        position_ids: [B, T]; where they start again, another sequence begins.
        new: T.
        arguments: those that are handed on to the language model.
    """
    check_whole_mask(mask, cache, new)
    if not cuts_of(config):
        return
    what = f"reduction {config.reduction_config} drops tokens inside the decoder"
    if cache is not None and not isinstance(cache, StagedCache):
        raise UserError(
            f"{what}, so that layers store different tokens, and a {type(cache).__name__} has one length: leave "
            "past_key_values and cache_implementation out, or give a llava_skip.reduction.cache.StagedCache."
        )
    if not is_two_dimensional(mask):
        raise UserError(f"{what} and makes the masks of its layers: give a 2-D attention_mask, not one of its own.")
    packed = any(arguments.get(name) is not None for name in OF_PACKED)
    if position_ids is not None and mask is None and cache is None and position_ids.shape[1] > 1:
        packed = packed or bool((position_ids.diff(dim=1) != 1).any())
    if packed:
        check_samples_apart(config)
    if torch.compiler.is_exporting():
        raise UserError(f"{what} by their values, which an exported graph cannot: export the model without reduction.")


def check_samples_apart(config: LlavaSkipConfig) -> None:
    """Raise UserError if the model cannot have several samples in one sequence."""
    if cuts_of(config):
        raise UserError(
            f"reduction {config.reduction_config} drops tokens of each sample by itself, and this batch has several "
            "samples in one sequence: train with `--padding_free false`, with padding."
        )


def check_chunks(config: LlavaSkipConfig, size: int | None) -> None:
    """Raise UserError if a prompt would come in chunks of `size` tokens: the last token decides what is dropped."""
    if size is not None and cuts_of(config):
        raise UserError(
            f"reduction {config.reduction_config} drops tokens by the attention of the prompt's last tokens, so that a "
            f"prompt cannot come in chunks: leave prefill_chunk_size ({size}) out."
        )
