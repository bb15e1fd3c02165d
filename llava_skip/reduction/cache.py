"""A key-value cache whose layers hold different numbers of tokens, for methods that drop tokens inside the decoder.

Shapes: B batch, H key-value heads, T new tokens, K tokens stored in a layer, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llava_skip.cache import CountingCache
from llava_skip_base.errors import UserError


@dataclass(frozen=True)
class Stored:
    """What the layers from one cut on have stored.

    Attributes:
        mask: [B, K] bool, False on padding; None if all tokens are real.
        shift: [B, 1], by how much positions in these layers are smaller than those of the whole sequence; None: by 0.
    """

    mask: Tensor | None = None
    shift: Tensor | None = None


class StagedCache(CountingCache):
    """Each layer stores the tokens that it has seen; positions and `generate` count those of the whole sequence.

    `get_seq_length` counts every token that was seen; `get_query_offset` and `get_mask_sizes` count those that a layer
    has stored. `stored` has, for the first layer behind each cut, what the layers from there on hold.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[int, Stored] = {}
        self.whole = 0  # the latest tokens that every layer has stored

    def store_from(self, layer: int, stored: Stored, tail: int | None) -> None:
        """Say what the layers from `layer` on will hold after this forward.

        Args:
            layer: the first layer behind a cut.
            stored: what they hold.
            tail: how many of the forward's last tokens they hold as their last ones; None: they hold all of it.
        """
        self.stored[layer] = stored
        if tail is not None:
            self.whole = min(self.whole, tail)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens [B, H, T, E] of a layer; returns all that it holds, [B, H, K + T, E]."""
        if layer_idx == 0:
            self.seen += key_states.shape[-2]
            self.whole += key_states.shape[-2]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def keys_of(self, layer: int) -> Tensor | None:
        """The keys [B, H, K, E] that a layer has stored; None if it has none."""
        return self.layers[layer].keys if layer < len(self.layers) and self.get_query_offset(layer) else None

    def _change_masks(self, change: Callable[[Tensor], Tensor]) -> None:
        self.stored = {
            layer: Stored(*(None if tensor is None else change(tensor) for tensor in (stored.mask, stored.shift)))
            for layer, stored in self.stored.items()
        }

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, as if they had never come.

        Raises:
            UserError: some of them were dropped in a layer, so that the layers would have to give up different numbers.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a number of tokens to remove, as 0 or less; got {tokens_to_remove}.")
        if -tokens_to_remove > self.whole:
            raise UserError(
                f"The last {-tokens_to_remove} tokens cannot be taken back: only the last {self.whole} came after the "
                "prompt whose image tokens were dropped inside the decoder. Give the prompt again, with a new cache."
            )
        if tokens_to_remove == 0:
            return
        super().crop(tokens_to_remove)
        self.stored = {
            layer: Stored(None if stored.mask is None else stored.mask[:, :tokens_to_remove], stored.shift)
            for layer, stored in self.stored.items()
        }
        self.seen, self.whole = self.seen + tokens_to_remove, self.whole + tokens_to_remove

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen, self.whole, self.stored = 0, 0, {}
