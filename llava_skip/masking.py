"""The attention mask under which rows do not see skipped tokens: generated rows, and text if it may not.

Shapes: B batch, T new rows of a sample, W its rows so far, K stored rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices

from llava_skip.cache import ForgettingCache
from llava_skip.configuration import SkipConfig
from llava_skip.errors import UserError
from llava_skip.routing import Pictures, hidden_from, skipped_rows


def is_two_dimensional(mask: Any) -> bool:
    """Whether it says which rows are real (or nothing), not which row sees which: a 4-D mask is the caller's own."""
    return mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)


def hide_skipped(mask: Tensor | None, is_image: Tensor, skip: SkipConfig) -> Tensor:
    """The mask [B, W] of rows behind a prompt, which do not see its skipped rows: position kept, key masked.

    This is what forgetting comes to in a cache that keeps every row.

    Args:
        mask: [B, W], 0 on padding; None if nothing is padded.
        is_image: [B, W] bool, the placeholders.
        skip: the sizes of a picture's block.
    """
    mask = torch.ones_like(is_image, dtype=torch.long) if mask is None else mask
    return mask.masked_fill(skipped_rows(is_image, skip), 0)


def mask_skipped(
    config: PreTrainedConfig,
    skip: SkipConfig | None,
    inputs_embeds: Tensor,
    mask: Any,
    cache: Cache | None,
    pictures: Pictures,
    position_ids: Tensor | None = None,
) -> Any:
    """The mask of a forward over a prompt: as it is, or the causal one in which some rows do not see skipped rows.

    Rows behind the prompt see none, as if the cache had forgotten them already (assisted decoding has both in one
    forward, decoding without a cache always). Without `skip.text_sees_skipped`, those of a picture are seen by its own
    rows alone.

    Args:
        config: of the language model; its attention implementation decides the form of the mask.
        skip: the sizes of a picture's block; None for a dense model.
        inputs_embeds: [B, T, D], the new rows.
        mask: [B, K + T], False or 0 on padding; None if nothing is padded.
        cache: what is stored already.
        pictures: where the placeholders are.
        position_ids: [B, T]; where they start again in a row and `mask` is None, another sample begins.

    Raises:
        UserError: the mask is 4-D already, or the attention implementation takes none.
    """
    total = pictures.is_image.shape[1]
    if skip is None or not skip.forget_cache or (skip.text_sees_skipped and pictures.prompt >= total):
        return mask
    # What a forgetting cache has stored in front of these rows is never skipped, and not in the place of its column.
    latest = max(pictures.new, cache.held) if isinstance(cache, ForgettingCache) else total
    viewer, owner = (numbers[:, -latest:] for numbers in hidden_from(pictures.is_image, skip))
    if not owner.any():
        return mask
    _check_maskable(config, mask)
    end = pictures.new + (0 if cache is None else int(cache.get_query_offset()))
    keys = end if cache is None else cache.get_mask_sizes(pictures.new, 0)[0]
    viewer, owner = (nn.functional.pad(numbers, (end - latest, keys - end)) for numbers in (viewer, owner))
    generated = end - total + pictures.prompt

    # Not left to create_causal_mask, which would call `visible` with positions in the place of rows.
    sample = None
    if position_ids is not None and mask is None and cache is None:
        sample = find_packed_sequence_indices(position_ids.expand(len(inputs_embeds), -1))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = query < generated if skip.text_sees_skipped else owner[batch, key] == viewer[batch, query]
        seen = (owner[batch, key] == 0) | allowed
        return seen if sample is None else seen & (sample[batch, query] == sample[batch, key])

    return create_causal_mask(config, inputs_embeds, mask, cache, and_mask_function=visible)


def _check_maskable(config: PreTrainedConfig, mask: Any) -> None:
    if not is_two_dimensional(mask):
        raise UserError(
            "Rows of this forward may not see skipped tokens: give a 2-D attention_mask, from which the model makes "
            "its own 4-D one."
        )
    if "flash" in (config._attn_implementation or ""):
        raise UserError(
            f"Rows of this forward may not see skipped tokens, which needs a mask, and {config._attn_implementation} "
            "takes none. This is so with skip.text_sees_skipped false, in assisted decoding and in generate without a "
            "cache: set attn_implementation to sdpa, eager or flex_attention."
        )
