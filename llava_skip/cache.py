"""A key-value cache that forgets skipped tokens as the prefill passes them.

Shapes: B batch, H key-value heads, T new tokens, K stored tokens, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from llava_skip.routing import Route, align_right

GROWTH = 128
"""Tokens by which a full buffer grows, so that a decode step writes in place and copies nothing."""


class GrowingLayer(DynamicLayer):
    """One layer's keys and values [B, H, K, E], at the front of buffers with room to grow."""

    def __init__(self, **kwargs: Any) -> None:
        self.length, self.growth = 0, GROWTH
        self._buffers: dict[str, Tensor] = {}
        super().__init__(**kwargs)

    def _stored(self, name: str) -> Tensor | None:
        return self._buffers[name][..., : self.length, :] if name in self._buffers else None

    def _replace(self, name: str, states: Tensor | None) -> None:
        if states is None:
            self._buffers.pop(name, None)
        else:
            self._buffers[name] = states
        self.length = 0 if states is None else states.shape[-2]

    # The operations of transformers' layers read and assign these two as plain attributes.
    keys = property(lambda self: self._stored("keys"), lambda self, states: self._replace("keys", states))
    values = property(lambda self: self._stored("values"), lambda self, states: self._replace("values", states))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and shape from the first tokens [B, H, T, E]; store none of them yet."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens [B, H, T, E] after the stored ones; returns all of them, [B, H, K + T, E]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        for name, new in (("keys", key_states), ("values", value_states)):
            self._buffers[name] = self._with_room(name, new, end)
            self._buffers[name][..., self.length : end, :] = new
        self.length = end
        return self.keys, self.values

    def _with_room(self, name: str, new: Tensor, end: int) -> Tensor:
        buffer = self._buffers[name]
        # With gradients a fresh buffer each time: writing into one that a graph has read would break its backward.
        if end <= buffer.shape[-2] and not new.requires_grad and not buffer.requires_grad:
            return buffer
        room = new.new_empty(*new.shape[:2], end + self.growth, new.shape[3])
        room[..., : self.length, :] = buffer[..., : self.length, :]
        return room

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the samples for beam search, keeping the room to grow."""
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer.index_select(0, beam_idx.to(buffer.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (a number of 0 or less, as in transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a number of tokens to remove, as 0 or less; got {tokens_to_remove}.")
        self.length = max(0, self.length + tokens_to_remove)


class CountingCache(Cache):
    """Counts twice: `get_seq_length` the tokens that were seen, `get_query_offset` those that a layer has stored.

    A subclass counts `seen`, and changes what it holds beside keys and values in `_change_masks`.
    """

    max_cache_len = -1  # no maximum; peft's prefix tuning asks for it

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GrowingLayer)
        self.seen = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, None]]:
        """Keys and values of each layer, as the caches of transformers give them."""
        for layer in self.layers:
            yield layer.keys, layer.values, None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens seen so far, those that are no longer stored included."""
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Number of tokens that a layer has stored so far, K."""
        return self.layers[layer_idx].length if layer_idx < len(self.layers) else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the samples for beam search."""
        super().reorder_cache(beam_idx)
        self._change_masks(lambda mask: mask.index_select(0, beam_idx.to(mask.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._change_masks(lambda mask: mask.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these samples."""
        super().batch_select_indices(indices)
        self._change_masks(lambda mask: mask[indices])

    def _change_masks(self, change: Callable[[Tensor], Tensor]) -> None:
        """Do to every tensor [B, ...] beside keys and values what was done to the samples."""
        raise NotImplementedError


class ForgettingCache(CountingCache):
    """Keeps, of each image, only the tokens that are not skipped; positions stay those of the whole sequence.

    `get_seq_length` counts every token that was seen, so position ids and `generate` go on as if nothing were dropped;
    `get_query_offset` and `get_mask_sizes` count the tokens that are stored, so masks fit the keys. Samples that keep
    fewer tokens than others are packed to the right, and `mask` [B, K] says which stored tokens are real (None: all).
    The forwards of a prompt in chunks are made inside of `chunked_prefill()`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None
        self.selection: Tensor | None = None
        self.in_chunks = False
        self.chunk_tokens = 0
        self._kept: Tensor | None = None
        self._dropped: Tensor | None = None  # [B, at most seen], see `_note_dropped`; later tokens are stored

    @contextmanager
    def chunked_prefill(self) -> Iterator[None]:
        """Inside, every token stays, so that the chunks of one prompt see each other's; the skipped ones go at the end.

        `chunk_tokens` counts these tokens. All layers store them at once, which a prompt in one piece never needs.
        """
        self.in_chunks = True
        try:
            yield
            self._drop_skipped()
        finally:
            self.in_chunks, self.chunk_tokens, self._kept = False, 0, None

    def _drop_skipped(self) -> None:
        if self._kept is None:
            return
        earlier = self.get_query_offset() - self.chunk_tokens
        self._note_dropped(self._kept, self.seen - self.chunk_tokens)
        self._keep(nn.functional.pad(self._kept, (earlier, 0), value=True))

    def _note_dropped(self, kept: Tensor, before: int) -> None:
        """Remember which tokens [B, T] that come after `before` others are not stored, or stored as padding."""
        earlier = kept.new_zeros(kept.shape[0], 0) if self._dropped is None else self._dropped
        self._dropped = torch.cat([nn.functional.pad(earlier, (0, before - earlier.shape[1])), ~kept], dim=1)

    def _keep(self, kept: Tensor) -> None:
        """Keep these of the stored tokens [B, K], packed to the right."""
        index, valid = align_right(kept)
        self.mask = unless_all(valid if self.mask is None else valid & self.mask.gather(1, index))
        for layer in self.layers:
            selection = _for_heads(index, layer.keys)
            layer.keys, layer.values = layer.keys.gather(2, selection), layer.values.gather(2, selection)

    def begin(self, route: Route, hidden_states: Tensor) -> Tensor | None:
        """Announce a forward over new tokens, before its first layer.

        Args:
            route: its `kept` [B, T] says which of the new tokens stay, its `real` which ones are no padding.
            hidden_states: [B, T, D], the new tokens, for shape and device.

        Returns:
            The attention mask of this forward, [B, K + T] over stored and new tokens; None if all of them are real.
        """
        before, stored, new, kept = self.mask, self.get_query_offset(), hidden_states.shape[1], route.kept
        if self.in_chunks:
            staying = route.real if kept is None else kept
            self._kept = join_masks(self._kept, self.chunk_tokens, staying, new, hidden_states)
            self.chunk_tokens, kept = self.chunk_tokens + new, None
        if kept is None:
            self.selection, valid, width = None, route.real, new
        else:
            self.selection, valid = align_right(kept, route.longest)
            width = self.selection.shape[1]
            if route.longest is None:
                valid = unless_all(valid)
            elif route.ffn_tokens is not None and len(route.ffn_tokens) == valid.numel():  # as many of each sample
                valid = None
        if (staying := route.real if kept is None else kept) is not None:
            self._note_dropped(staying, self.seen)
        self.mask = join_masks(before, stored, valid, width, hidden_states)
        return join_masks(before, stored, route.real, new, hidden_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new tokens [B, H, T, E] that stay, and return what attention sees: the stored and all new ones.

        The skipped tokens live in the returned tensors alone, so one layer's are freed before the next layer's exist.
        """
        if layer_idx == 0:
            self.seen += key_states.shape[-2]
        if self.selection is None:
            return super().update(key_states, value_states, layer_idx)
        visible = key_states, value_states
        if layer_idx < len(self.layers) and self.layers[layer_idx].length:
            layer = self.layers[layer_idx]
            visible = torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)
        index = _for_heads(self.selection, key_states)
        super().update(key_states.gather(2, index), value_states.gather(2, index), layer_idx)
        return visible

    def _change_masks(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("mask", "_kept", "_dropped"):
            if (mask := getattr(self, name)) is not None:
                setattr(self, name, change(mask))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens that were seen, as if they had never come.

        Of those, the forgotten ones are not stored: each sample gives up as many stored tokens as it has among them.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a number of tokens to remove, as 0 or less; got {tokens_to_remove}.")
        left, stored = max(0, self.seen + tokens_to_remove), self.get_query_offset()
        if self._dropped is None or self._dropped.shape[1] <= left:
            super().crop(left - self.seen)
            self.mask = None if self.mask is None else self.mask[:, : stored + left - self.seen]
        else:
            removed = self.seen - left - self._dropped[:, left:].sum(dim=1, keepdim=True)
            real = self._dropped.new_ones(len(removed), stored) if self.mask is None else self.mask
            self._keep(real & (real.flip(1).cumsum(dim=1).flip(1) > removed))
            self._dropped = self._dropped[:, :left]
        if self._kept is not None:
            self._kept = self._kept[:, : max(0, self.chunk_tokens + left - self.seen)]
        self.chunk_tokens, self.seen = max(0, self.chunk_tokens + left - self.seen), left

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen, self.chunk_tokens = 0, 0
        self.mask, self.selection, self._kept, self._dropped = None, None, None, None


def _for_heads(index: Tensor, like: Tensor) -> Tensor:
    """An index of tokens [B, K] as one into keys or values [B, H, T, E]: [B, H, K, E]."""
    return index.to(like.device)[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])


def unless_all(mask: Tensor | None) -> Tensor | None:
    """A mask, or None if it says that all are real."""
    return None if mask is None or bool(mask.all()) else mask


def join_masks(old: Tensor | None, stored: int, new: Tensor | None, width: int, like: Tensor) -> Tensor | None:
    """Masks [B, stored] and [B, width] side by side; None means that all are real."""
    if old is None and new is None:
        return None
    parts = [(old, stored), (new, width)]
    ones = like.new_ones
    return torch.cat([ones(like.shape[0], n, dtype=torch.bool) if m is None else m for m, n in parts], dim=1)


def num_seen(cache: Cache | None) -> int:
    """Number of tokens that a cache has seen."""
    return 0 if cache is None else int(cache.get_seq_length())


def is_decode_step(cache: Cache | None, new: int) -> bool:
    """One new token a sample for a cache: nothing to route, and no synchronisation, if it has no image."""
    return new == 1 and cache is not None and not (isinstance(cache, ForgettingCache) and cache.in_chunks)
