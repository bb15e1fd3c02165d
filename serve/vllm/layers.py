"""The decoder layers of vLLM's language models, with two calls of each in other hands: its FFN and its attention.

The layers stay vLLM's own. Without a `Forward` they do what they always do, compiled or in a CUDA graph too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llava_skip.configuration import SkipConfig
from serve.vllm.rows import Expanded


@dataclass(frozen=True)
class Forward:
    """What is different in a forward with images.

    Attributes:
        ffn: [M], the rows that take the FFN in layers that skip.
        rows: the rows of a model that forgets; None for one that keeps every key.
    """

    ffn: Tensor
    rows: Expanded | None = None


class Hooks:
    """Takes over the FFN of the layers that skip, and the attention of all layers of a model that forgets.

    Args:
        layers: the decoder layers, with `mlp` and `self_attn.attn` as vLLM's LLaMA has them.
        skip: the method.
    """

    def __init__(self, layers: Iterable[Any], skip: SkipConfig) -> None:
        self.current: Forward | None = None
        for index, layer in enumerate(layers):
            if skip.layers is None or index in skip.layers:
                layer.mlp.forward = partial(self._feed, layer.mlp.forward)
            if skip.forget_cache:
                attention = layer.self_attn.attn
                attention.forward = partial(self._attend, attention, attention.forward)

    @contextmanager
    def running(self, forward: Forward) -> Iterator[None]:
        """While a forward with images runs."""
        self.current = forward
        try:
            yield
        finally:
            self.current = None

    def _feed(self, stock: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
        """The FFN on the rows that take it, and 0 for others: vLLM adds what it gives to the residual."""
        if self.current is None or torch.compiler.is_compiling():
            return stock(states)
        rows = self.current.ffn
        return torch.zeros_like(states).index_copy(0, rows, stock(states[rows]))

    def _attend(
        self,
        attention: Any,
        stock: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attention of the engine's own rows, which also stores their keys; then of sequences with images, over all.

        Args:
            attention: vLLM's layer.
            stock: its forward.
            query: [E, heads * width].
            key: [E, key heads * width].
            value: as `key`.
            *args: further arguments of vLLM.
            **kwargs: the same, by name.
        """
        if self.current is None or self.current.rows is None or torch.compiler.is_compiling():
            return stock(query, key, value, *args, **kwargs)
        rows, own = self.current.rows, self.current.rows.kept
        attended = stock(query[own], key[own], value[own], *args, **kwargs)
        out = attended.new_zeros(len(query), attended.shape[-1]).index_copy(0, own, attended)
        for start, end, mask in rows.sequences:
            q, k, v = (_heads(part[start:end], attention.head_size) for part in (query, key, value))
            seen = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=attention.impl.scale, enable_gqa=True
            )
            out[start:end] = seen[0].transpose(0, 1).flatten(1)
        return out


def _heads(states: Tensor, width: int) -> Tensor:
    """[rows, heads * width] -> [1, heads, rows, width]."""
    return states.view(1, len(states), -1, width).transpose(1, 2)
