"""`grid`: T tokens of each crop, evenly spaced."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava_skip.reduction.choosing import spread
from llava_skip.reduction.method import Selection

if TYPE_CHECKING:
    from llava_skip.reduction.config import ReductionConfig
    from llava_skip.vision.view import View


def lattice(count: int, side: int, device: torch.device) -> Tensor:
    """Indices [count] of patches that are evenly spaced over side x side of them, ascending.

    They are in r = round(sqrt(count)) rows: floor((2 i + 1) side / (2 r)) for i = 0..r - 1. The rows share the tokens
    evenly, row i has those from floor(i count / r) on, and n tokens of a row are in the columns
    floor((2 j + 1) side / (2 n)). A square number gives a square lattice.
    """
    rows = round(count**0.5)
    token = torch.arange(count, device=device)
    row = ((token + 1) * rows - 1) // count
    first = row * count // rows
    in_row = (row + 1) * count // rows - first
    column = (2 * (token - first) + 1) * side // (2 * in_row)
    return (2 * row + 1) * side // (2 * rows) * side + column


class Grid(Selection):
    """A lattice of patches; where the visual tokens are no patches, evenly spaced ones of their list."""

    name = "grid"

    def select(self, view: View, reduction: ReductionConfig) -> Tensor:
        """[N, T, D]."""
        count, device = reduction.count, view.pixel_values.device
        is_grid = view.front_end.gives_patches
        places = lattice(count, view.side, device) if is_grid else spread(count, view.count, device)
        return view.keep(places.expand(view.pixel_values.shape[0], -1))
