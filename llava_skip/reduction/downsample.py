"""`downsample`: a smaller picture, of which the tower makes fewer patches."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING

from torch import Tensor

from llava_skip.reduction.method import Selection

if TYPE_CHECKING:
    from llava_skip.reduction.config import ReductionConfig
    from llava_skip.vision.view import View


class Downsample(Selection):
    """Each crop is made s x s patches large, s = floor(sqrt(TOKENS)); T = s * s, the largest square in TOKENS.

    The picture is resized after its normalisation (bicubic with anti-aliasing), the tower's positions as for a tower of
    another resolution (bicubic, corners aligned).
    """

    name = "downsample"
    reads_patches = True

    def rows(self, reduction: ReductionConfig, tokens: int) -> int:
        """The largest square."""
        return isqrt(reduction.count) ** 2

    def select(self, view: View, reduction: ReductionConfig) -> Tensor:
        """[N, T, D]."""
        return view.smaller(isqrt(reduction.count))
