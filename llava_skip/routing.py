"""Which rows of a batch take the FFN and which ones the cache keeps: pure functions on tensors.

Shapes: B batch, T new rows of a sample, D width, M rows that take the FFN, K rows that the cache keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_skip.configuration import SkipConfig


@dataclass(frozen=True)
class Route:
    """What happens to each row of one forward, computed once and used by every layer.

    Attributes:
        ffn_rows: [M] flat indices into [B * T] of the rows that take the FFN; None if all do.
        kept: [B, T] True where the cache keeps the row's keys and values; None if it keeps all.
    """

    ffn_rows: Tensor | None = None
    kept: Tensor | None = None


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
    first, end = skip.skipped_span
    return is_image & (place >= first) & (place < end)


def make_route(is_image: Tensor, real: Tensor | None, skip: SkipConfig | None) -> Route:
    """The route of a forward over whole pictures and text (a prefill or a training step).

    Args:
        is_image: [B, T] bool, the placeholders.
        real: [B, T] bool, False on padding; None if nothing is padded.
        skip: None for a dense model, whose padding still costs no FFN.
    """
    ffn = real
    if skip is not None:
        unskipped = ~skipped_rows(is_image, skip)
        ffn = unskipped if real is None else real & unskipped
    if ffn is None:
        return Route()
    rows = ffn.flatten().nonzero().squeeze(1)
    if rows.numel() == ffn.numel():
        return Route()
    return Route(ffn_rows=rows, kept=ffn if skip is not None and skip.forget_cache else None)


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
