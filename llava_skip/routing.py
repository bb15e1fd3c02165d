"""Which rows of a batch take the FFN and which ones the cache keeps: pure functions on tensors.

Shapes: B batch, T new rows of a sample, D width, M rows that take the FFN, K rows that the cache keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from llava_skip.configuration import SkipConfig


@dataclass(frozen=True)
class Route:
    """What happens to each row of one forward, computed once and used by every layer.

    Attributes:
        ffn_rows: [M] flat indices into [B * T] of the rows that take the FFN; None if all do.
        kept: [B, T] True where the cache keeps the row's keys and values; None if it keeps all.
        skipped: [B, T] True where a row skips the FFN; None if none does.
        layers: the layers that the route is for; None: all. The others run all rows.
    """

    ffn_rows: Tensor | None = None
    kept: Tensor | None = None
    skipped: Tensor | None = None
    layers: tuple[int, ...] | None = None

    def rows_in(self, layer: int) -> Tensor | None:
        """`ffn_rows` in this layer; None if all rows take its FFN."""
        return self.ffn_rows if self.layers is None or layer in self.layers else None


def skipped_rows(is_image: Tensor, skip: SkipConfig) -> Tensor:
    """True where a row is a skipped visual token.

    Every picture takes `skip.rows` placeholders, so a placeholder's place in its picture is its count in the
    sample modulo that number: any offset, any number of pictures a sample, adjacent pictures included.

    Args:
        is_image: [B, T] bool, the placeholders of whole pictures.
        skip: the sizes of a picture's block.

    Returns:
        [B, T] bool.
    """
    place = (is_image.cumsum(dim=1) - 1) % skip.rows
    return is_image & _skipping(skip, is_image.device)[place]


@lru_cache(maxsize=32)
def _skipping(skip: SkipConfig, device: torch.device) -> Tensor:
    """`skip.skipping` as a tensor on the device: copied there once, not in every forward."""
    return torch.tensor(skip.skipping, device=device)


def hidden_from(is_image: Tensor, skipped: Tensor, skip: SkipConfig) -> tuple[Tensor, Tensor]:
    """Which rows may not see skipped rows: those behind a picture, of that picture's.

    Args:
        is_image: [B, T] bool, the placeholders.
        skipped: [B, T] bool, the rows that skip.
        skip: the sizes of a picture's block.

    Returns:
        viewer [B, T], the number of the picture that a row belongs to, 0 for text; and owner [B, T], the number of the
        picture whose skipped row this is, 0 for every other row. Row i may see row j unless owner[j] is neither 0 nor
        viewer[i].
    """
    number = torch.where(is_image, (is_image.cumsum(dim=1) - 1) // skip.rows + 1, 0)
    return number, torch.where(skipped, number, 0)


def make_route(is_image: Tensor, real: Tensor | None, skip: SkipConfig | None) -> Route:
    """The route of a forward over whole pictures and text (a prefill or a training step).

    Args:
        is_image: [B, T] bool, the placeholders.
        real: [B, T] bool, False on padding; None if nothing is padded.
        skip: None for a dense model, whose padding still costs no FFN.
    """
    ffn, skipped = real, None
    if skip is not None:
        skipped = skipped_rows(is_image, skip)
        ffn = ~skipped if real is None else real & ~skipped
    if ffn is None:
        return Route()
    rows = ffn.flatten().nonzero().squeeze(1)
    if rows.numel() == ffn.numel():
        return Route()
    kept = ffn if skip is not None and skip.forget_cache else None
    return Route(ffn_rows=rows, kept=kept, skipped=skipped, layers=skip.layers if skip else None)


def take_rows(hidden_states: Tensor, rows: Tensor) -> Tensor:
    """Gather rows: [B, T, D] and flat indices [M] -> [M, D]."""
    return hidden_states.flatten(0, 1).index_select(0, rows)


def add_rows(hidden_states: Tensor, rows: Tensor, update: Tensor) -> Tensor:
    """Put back: [B, T, D] with `update` [M, D] added at the flat indices `rows` [M]; the other rows unchanged."""
    flat = hidden_states.flatten(0, 1)
    return flat.index_add(0, rows, update.to(flat.dtype)).view_as(hidden_states)


def align_right(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Where the kept rows of each sample come from when they are packed to the right end.

    Args:
        kept: [B, T] bool.

    Returns:
        index [B, K] into T, in order, K the largest number that a sample keeps; and valid [B, K], False on the rows
        in front of a sample that keeps fewer.
    """
    longest = int(kept.sum(dim=1).max())
    order = kept.to(torch.uint8).argsort(dim=1, stable=True)
    index = order[:, order.shape[1] - longest :]
    return index, kept.gather(1, index)
