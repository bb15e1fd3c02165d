"""A cache that forgets skipped tokens and whose tensors keep their shapes and places while tokens are generated.

A compiled decode step and a CUDA graph need that. Its size is what the prefill keeps and the tokens to come, and
nothing grows; `llava_skip.cache.ForgettingCache` is for conversations without an end.

Shapes: B batch, H key-value heads, T new tokens, K stored tokens, C places of a buffer, E head width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llava_skip.cache import ForgettingCache, GrowingLayer
from llava_skip.routing import Route


class FixedLayer(GrowingLayer):
    """One layer's keys and values, at the front of buffers [B, H, C, E].

    Until `fix` it is a `GrowingLayer`. From then on the number of stored tokens, `position`, is on the device, so that
    a step neither reads it nor depends on it.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.growth = room
        self.position: Tensor | None = None

    def _stored(self, name: str) -> Tensor | None:
        if self.position is not None and name in self._buffers:
            return self._buffers[name][..., : int(self.position), :]
        return super()._stored(name)

    def fix(self, places: int) -> None:
        """Let the buffers have so many places, C, from now on."""
        for name, buffer in self._buffers.items():
            if buffer.shape[-2] != places:
                self._buffers[name] = buffer.new_zeros(*buffer.shape[:2], places, buffer.shape[3])
                self._buffers[name][..., : self.length, :] = buffer[..., : self.length, :]
            else:
                buffer[..., self.length :, :] = 0  # a masked value counts zero times, but not if it is not finite
        self.position, self.is_compileable = torch.tensor(self.length, device=self.device), True
        for tensor in (*self._buffers.values(), self.position):
            torch._dynamo.mark_static_address(tensor)

    def release(self, length: int) -> None:
        """Be a `GrowingLayer` again, with so many stored tokens."""
        self.length, self.position, self.is_compileable = length, None, False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens [B, H, T, E] after the stored ones; returns all, once fixed all places [B, H, C, E]."""
        if self.position is None:
            return super().update(key_states, value_states)
        for name, new in (("keys", key_states), ("values", value_states)):
            self._buffers[name].index_copy_(2, self.position.view(1), new)
        self.position.add_(1)
        return self._buffers["keys"], self._buffers["values"]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the samples for beam search, in place."""
        for buffer in self._buffers.values():
            buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))


class StaticForgettingCache(ForgettingCache):
    """A `ForgettingCache` that has room for `new_tokens` more tokens than the prompts keep, and no more.

    `generate(cache_implementation="static")` makes one, and makes room in one that it is given. A step with one token
    a sample, once there is a prompt, fixes it: buffers and positions then stay where they are. Any other forward or
    change releases it, which reads the device once.

    A step does not read how full it is. One token too many is torch's own error: an IndexError on a CPU; on a CUDA
    device an assertion, after which the process can use that device no more. A step writes in place, so that it has no
    gradients that could go back through an earlier one: `ForgettingCache` is for these.

    Args:
        new_tokens: that will be generated after a prompt.
        least: places that it has at least once it is fixed, so that steps compiled for a larger one serve it too.
    """

    is_compileable = True

    def __init__(self, new_tokens: int, least: int = 0) -> None:
        super().__init__()
        self.new_tokens, self.least = new_tokens, least
        self.layer_class_to_replicate = partial(FixedLayer, new_tokens)
        self.is_fixed = False
        self.places = 0
        self._real: Tensor | None = None  # [B, C], False on padding among what was stored when it was fixed
        self._order: Tensor | None = None
        self._forgotten = 0

    def give_room(self, new_tokens: int) -> None:
        """Have room for so many tokens, or more, after the next prompt."""
        self.release()
        self.new_tokens = max(new_tokens, self.new_tokens)
        self.layer_class_to_replicate = partial(FixedLayer, self.new_tokens)
        for layer in self.layers:
            layer.growth = self.new_tokens

    def fix(self) -> None:
        """From now on one token a sample comes in each forward."""
        if self.is_fixed:
            return
        stored = super().get_query_offset()
        self.places, self._forgotten = max(stored + self.new_tokens, self.least), self.seen - stored
        self.is_fixed = True
        for layer in self.layers:
            layer.fix(self.places)
        device = self.layers[0].device
        self._order = torch.arange(self.places, device=device)
        room = self.places - stored
        self._real = None if self.mask is None else nn.functional.pad(self.mask, (0, room), value=True)
        for tensor in (self._order, self._real):
            if tensor is not None:
                torch._dynamo.mark_static_address(tensor)

    def release(self) -> None:
        """Be a `ForgettingCache` until the next step."""
        if not self.is_fixed:
            return
        stored, self.is_fixed = int(self.layers[0].position), False
        for layer in self.layers:
            layer.release(stored)
        self.seen = stored + self._forgotten
        self.mask = None if self._real is None else self._real[:, :stored]

    def begin(self, route: Route, hidden_states: Tensor) -> Tensor | None:
        """As in `ForgettingCache`; the mask of a fixed one is [B, C], False on places that nothing is in."""
        if hidden_states.shape[1] == 1 and not self.in_chunks and route.kept is None and len(self.layers):
            self.fix()
            return self.step_mask(hidden_states.shape[0])
        self.release()
        return super().begin(route, hidden_states)

    def step_mask(self, batch: int) -> Tensor:
        """The places [B, C] that a new token sees, its own included."""
        assert self._order is not None  # it is fixed
        filled = (self._order <= self.layers[0].position).expand(batch, -1)
        return filled if self._real is None else filled & self._real

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As in `ForgettingCache`; once it is fixed, all places [B, H, C, E]."""
        if self.is_fixed:
            return self.layers[layer_idx].update(key_states, value_states)
        return super().update(key_states, value_states, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Number of tokens seen so far; on the device once it is fixed."""
        return self.layers[0].position + self._forgotten if self.is_fixed else super().get_seq_length(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Number of tokens that a layer has stored so far, K; on the device once it is fixed."""
        return self.layers[layer_idx].position if self.is_fixed else super().get_query_offset(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys that a forward sees, and of those that are no longer stored in front of them, 0."""
        return (self.places, 0) if self.is_fixed else super().get_mask_sizes(query_length, layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the samples for beam search, in place."""
        super().reorder_cache(beam_idx)
        if self.is_fixed and self._real is not None:
            self._real.copy_(self._real.index_select(0, beam_idx.to(self._real.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample `repeats` times."""
        self.release()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these samples."""
        self.release()
        super().batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, as `ForgettingCache.crop`."""
        self.release()
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        self.is_fixed, self.places, self._real, self._order, self._forgotten = False, 0, None, None, 0
        for layer in self.layers:
            layer.release(0)
        super().reset()
