"""Runs a method that freezes image tokens in some layers: there they ask nothing and take no FFN.

Shapes: B batch, T tokens of a forward, K tokens that a layer has stored, M tokens that are not frozen, R the largest
number of them in a sample, F that of the others, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.utils.generic import is_flash_attention_requested

from llava_skip.head_rows import SEQUENCE_LENGTHS, HeadRows, keys_and_values
from llava_skip.routing import add_to_tokens, align_right, take_tokens

if TYPE_CHECKING:
    from llava_skip.decoder import SkippingLayer


class FrozenTokens:
    """Runs the layers of one forward over images and text; in the frozen ones only text moves.

    Queries, output projection and FFN are then computed for text alone. Flash attention, and attention to each sample
    of a row by itself, take no mask that says which token a query is, so there the queries of all are computed, and
    those of frozen tokens are thrown away.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        config: PreTrainedConfig,
        moving: Tensor,
        ffn_tokens: Tensor | None,
        head: HeadRows | None = None,
    ) -> None:
        """Before the first layer.

        Args:
            layers: those in which image tokens are frozen.
            config: of the language model.
            moving: [B, T] bool, the tokens that are not frozen: text, without padding.
            ffn_tokens: flat indices of the tokens that take the FFN in the other layers; None if all do.
            head: what the last layer computes; None: all tokens.
        """
        self.layers, self.ffn_tokens = frozenset(layers), ffn_tokens
        self.head, self.moving = head, moving
        self.uses_flash = is_flash_attention_requested(config)
        self.tokens = moving.flatten().nonzero().squeeze(1)
        self.packed, valid = align_right(moving)
        self.frozen, _ = align_right(~moving)
        self.taken = valid.flatten().nonzero().squeeze(1)
        self.order = _order(moving, self.packed.shape[1], self.frozen.shape[1])

    def run(self, layer: SkippingLayer, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
        """A decoder layer: [B, T, D] -> [B, T, D]; of the last one, what reaches the head."""
        index = layer.self_attn.layer_idx
        if self.head is not None and index == self.head.layer:
            moved = self.head.run(layer, hidden_states, arguments)
            if index not in self.layers:
                return moved
            moves = self.head.take(self.moving.unsqueeze(-1).to(moved.device))
            return torch.where(moves, moved, self.head.take(hidden_states))
        if index not in self.layers:
            return layer.run(hidden_states, self.ffn_tokens, arguments)
        tokens = self.tokens.to(hidden_states.device)
        update = self._attend(layer, layer.input_layernorm(hidden_states), arguments)
        hidden_states = add_to_tokens(hidden_states, tokens, update)
        taken = layer.post_attention_layernorm(take_tokens(hidden_states, tokens))
        return add_to_tokens(hidden_states, tokens, layer.mlp(taken))

    def restore(self, hidden_states: Tensor) -> Tensor:
        """All tokens are there, or those that reach the head."""
        return hidden_states

    def _attend(self, layer: SkippingLayer, normed: Tensor, arguments: dict[str, Any]) -> Tensor:
        """What attention gives the tokens that are not frozen, [M, D]."""
        mask, cache = arguments.get("attention_mask"), arguments.get("past_key_values")
        is_readable = mask is None or (isinstance(mask, Tensor) and mask.ndim == 4)
        is_packed = arguments.get(SEQUENCE_LENGTHS) is not None
        if self.uses_flash or is_packed or not is_readable or self.packed.shape[1] == 0:
            attended, _ = layer.self_attn(hidden_states=normed, **arguments)
            return take_tokens(attended, self.tokens.to(attended.device))
        device = normed.device
        packed, frozen, order = (index.to(device) for index in (self.packed, self.frozen, self.order))
        tables = arguments["position_embeddings"]
        added = _Frozen(layer.self_attn, _rows(normed, frozen), tuple(_rows(t, frozen) for t in tables), order, cache)
        changed = {
            "attention_mask": self._mask(mask, packed, layer.self_attn.layer_idx, cache),
            "position_embeddings": tuple(_rows(table, packed) for table in tables),
            "position_ids": None,
            "past_key_values": added,
        }
        attended, _ = layer.self_attn(hidden_states=_rows(normed, packed), **arguments | changed)
        return take_tokens(attended, self.taken.to(device))

    def _mask(self, mask: Tensor | None, packed: Tensor, layer: int, cache: Cache | None) -> Tensor:
        """The rows [B, 1, R, K + T] of the tokens that are not frozen; None stands for the causal mask."""
        if mask is not None:
            mask = mask.expand(len(packed), -1, -1, -1)
            return mask.gather(2, packed[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        length, before = self.order.shape[1], 0 if cache is None else cache.get_query_offset(layer)
        keys = length if cache is None else cache.get_mask_sizes(length, layer)[0]
        return torch.arange(keys, device=packed.device) <= (packed[:, None, :, None] + before)


class _Frozen:
    """Stands in for the cache of a layer: adds the keys and values of frozen tokens to those of the others."""

    def __init__(
        self, attention: Any, normed: Tensor, tables: tuple[Tensor, ...], order: Tensor, cache: Cache | None
    ) -> None:
        self.order, self.cache = order, cache
        self.keys, self.values = keys_and_values(attention, normed, tables)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, R, E] of the others -> those of all, in the order of the sequence."""
        keys, values = (
            torch.cat([moving, frozen], dim=2).gather(2, self._index(frozen))
            for moving, frozen in ((keys, self.keys), (values, self.values))
        )
        return (keys, values) if self.cache is None else self.cache.update(keys, values, *args, **kwargs)

    def _index(self, like: Tensor) -> Tensor:
        return self.order[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])


def _order(moving: Tensor, most_moving: int, most_frozen: int) -> Tensor:
    """Where each token [B, T] is when the moving ones, packed to the right, come first and then the others."""
    here = moving.cumsum(dim=1) - 1 + most_moving - moving.sum(dim=1, keepdim=True)
    there = (~moving).cumsum(dim=1) - 1 + most_moving + most_frozen - (~moving).sum(dim=1, keepdim=True)
    return torch.where(moving, here, there)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows [B, R] of [B or 1, T, E] -> [B, R, E]."""
    return table.expand(len(index), -1, -1).gather(1, index.unsqueeze(-1).expand(-1, -1, table.shape[-1]))
