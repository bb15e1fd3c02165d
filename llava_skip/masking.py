"""The attention mask under which tokens do not see skipped tokens: generated ones, and text if it may not.

Shapes: B batch, T new tokens of a sample, W its tokens so far, K stored tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices
from transformers.utils.generic import is_flash_attention_requested

from llava_skip.cache import ForgettingCache
from llava_skip.counts import real_tokens
from llava_skip.routing import ImageTokens, Route
from llava_skip_base.errors import UserError


def is_two_dimensional(mask: Any) -> bool:
    """Whether it says which tokens are real (or nothing), not which one sees which: a 4-D mask is the caller's own."""
    return mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)


def mask_skipped(
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    mask: Any,
    cache: Cache | None,
    images: ImageTokens,
    position_ids: Tensor | None = None,
) -> Any:
    """The mask of a forward over a prompt: as it is, or the causal one in which some tokens do not see skipped ones.

    Generated tokens see none, as if the cache had forgotten them already (assisted decoding has prompt and generated
    tokens in one forward, decoding without a cache always). Without `skip.text_sees_skipped`, the skipped tokens of an
    image are seen by that image's own tokens alone.

    Args:
        config: of the language model; its attention implementation decides the form of the mask.
        inputs_embeds: [B, T, D], the new tokens.
        mask: [B, K + T], False or 0 on padding; None if nothing is padded.
        cache: what is stored already.
        images: where the image tokens are.
        position_ids: [B, T]; where they start again in a sample and `mask` is None, another sequence begins.

    Raises:
        UserError: the mask is 4-D already, or the attention implementation takes none.
    """
    skip = images.skip
    if skip is None or not skip.forget_cache or (skip.text_sees_skipped and images.generated == 0):
        return mask
    owner, viewer = _owners(images, cache)
    if not (owner.any() if images.counts is None else images.counts.hidden):
        return mask
    _check_maskable(config, mask)
    end = images.new + (0 if cache is None else int(cache.get_query_offset()))
    keys = end if cache is None else cache.get_mask_sizes(images.new, 0)[0]
    viewer, owner = (nn.functional.pad(x, (end - x.shape[1], keys - end)) for x in (viewer, owner))
    first_generated = end - images.generated

    # Not left to create_causal_mask, which would call `visible` with positions instead of indices.
    sequence = None
    if position_ids is not None and mask is None and cache is None:
        sequence = find_packed_sequence_indices(position_ids.expand(len(inputs_embeds), -1))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = query < first_generated if skip.text_sees_skipped else owner[batch, key] == viewer[batch, query]
        seen = (owner[batch, key] == 0) | allowed
        return seen if sequence is None else seen & (sequence[batch, query] == sequence[batch, key])

    return create_causal_mask(config, inputs_embeds, mask, cache, and_mask_function=visible)


def latest_tokens(images: ImageTokens, cache: Cache | None) -> int:
    """Number of tokens at the end of W of which any may be skipped, before `ForgettingCache.begin`; 0: all of them."""
    # What a forgetting cache has stored of earlier forwards is never skipped, but for those of the same prompt.
    return images.new + cache.chunk_tokens if isinstance(cache, ForgettingCache) else 0


def find_real(mask: Any, images: ImageTokens) -> Tensor | None:
    """[B, T] bool, False on padding among the new tokens; None if none of them is padding, or it is not known."""
    counts = images.counts
    if mask is None or not is_two_dimensional(mask) or counts is None or counts.real == counts.tokens:
        return None
    return real_tokens(mask, images.new)


def attends_in_window(config: PreTrainedConfig) -> bool:
    """Whether a layer of a language model attends in a sliding window."""
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    return window is not None or not kinds <= {"full_attention"}


def forward_mask(
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    mask: Any,
    cache: Cache | None,
    route: Route,
    images: ImageTokens | None,
    position_ids: Tensor | None = None,
    padded: bool | None = None,
) -> Any:
    """The mask of a forward over stored and new tokens; also says to a forgetting cache which new ones stay.

    Args:
        config: of the language model.
        inputs_embeds: [B, T, D], the new tokens.
        mask: as the caller of the forward gave it.
        cache: what is stored already.
        route: of the forward.
        images: where the image tokens are; None in a decode step.
        position_ids: [B, T].
        padded: whether the mask of a decode step has padding; None: it is not known.
    """
    if images is not None:
        padded = None if images.counts is None else images.counts.padding > 0
    if isinstance(cache, ForgettingCache):
        stored_mask = cache.begin(route, inputs_embeds)
        if is_two_dimensional(mask):
            mask, padded = stored_mask, stored_mask is not None
    if images is not None:
        mask = mask_skipped(config, inputs_embeds, mask, cache, images, position_ids)
    return settle_mask(config, inputs_embeds, mask, cache, position_ids, padded)


def settle_mask(
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    mask: Any,
    cache: Cache | None,
    position_ids: Tensor | None,
    padded: bool | None,
) -> Any:
    """The mask of a forward in a form that transformers takes as it is, without reading whether it has padding.

    Args:
        config: of the language model.
        inputs_embeds: [B, T, D], the new tokens.
        mask: of the stored and new tokens.
        cache: what is stored already.
        position_ids: [B, T]; where there is neither a mask nor a cache, transformers finds several sequences by them.
        padded: whether a mask [B, K + T] has padding; None: it is not known.
    """
    if padded is None or mask is None or not is_two_dimensional(mask):
        return mask
    if not padded:
        return mask if cache is None and position_ids is not None else None
    if is_flash_attention_requested(config) or attends_in_window(config):
        return mask
    return create_causal_mask(config, inputs_embeds, mask, cache, allow_is_causal_skip=False)


class OneSequence:
    """In place of a cache: tells transformers that each sample is one sequence, which it would read from the positions.

    No layer sees it.
    """

    is_compileable = False

    def get_seq_length(self) -> int:
        """No tokens came before."""
        return 0

    def get_query_offset(self, layer_idx: int) -> int:
        """No tokens are stored."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys, and of keys before them that are not stored."""
        return query_length, 0


def one_sequence(
    config: PreTrainedConfig, mask: Any, cache: Cache | None, position_ids: Tensor | None
) -> Cache | OneSequence | None:
    """The cache of a forward; where it is known that there is nothing to look for, a `OneSequence` instead of none."""
    alone = mask is None and cache is None and position_ids is None and not torch.compiler.is_exporting()
    return OneSequence() if alone and not attends_in_window(config) else cache


def _owners(images: ImageTokens, cache: Cache | None) -> tuple[Tensor, Tensor]:
    """Which tokens may not see which skipped tokens, of the latest ones among which there are skipped ones.

    Returns:
        owner and viewer, both [B, at most W]: the number of the image whose skipped token this is, 0 for every other
        token; and the number of the image that a token belongs to, 0 for text. Token i may see token j if owner[j] is 0
        (not skipped) or viewer[i] (of the same image).
    """
    viewer, skipped = images.numbers, images.skipped
    assert skipped is not None  # a dense model has none
    if isinstance(cache, ForgettingCache):  # what it has stored of earlier forwards is never skipped
        latest = max(images.new, cache.chunk_tokens)
        if viewer.shape[1] < latest:
            raise UserError(
                f"The cache holds {latest} tokens of a prompt in chunks: give prompt_images, where the image tokens of "
                "all chunks so far are."
            )
        viewer = viewer[:, -latest:]
    return viewer.where(skipped[:, -viewer.shape[1] :], 0), viewer


def _check_maskable(config: PreTrainedConfig, mask: Any) -> None:
    if not is_two_dimensional(mask):
        raise UserError(
            "Tokens of this forward may not see skipped tokens: give a 2-D attention_mask, from which the model makes "
            "its own 4-D one."
        )
    if is_flash_attention_requested(config):
        raise UserError(
            "Tokens of this forward may not see skipped tokens, which needs a mask, and flash attention takes none. "
            "This is so with skip.text_sees_skipped false, in assisted decoding and in generate without a cache: set "
            "attn_implementation to sdpa, eager or flex_attention."
        )
