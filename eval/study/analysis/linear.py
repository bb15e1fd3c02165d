"""The best linear map from some vectors to others, fitted on one half of the tokens and judged on the other.

Shapes: M tokens, D width of the inputs, C width of the outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FEWEST = 2
"""Tokens for each number of a channel's map; with fewer it follows their noise."""


class LinearFit:
    """Least squares with a bias from sums alone, in float64: any number of tokens takes the memory of two matrices."""

    def __init__(self) -> None:
        self._sums: dict[bool, tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, inputs: Tensor, outputs: Tensor, first: Tensor) -> None:
        """Add tokens: inputs [M, D], outputs [M, C], and which of them [M] belong to the half that is fitted."""
        x = torch.cat([inputs.double(), torch.ones_like(inputs[:, :1], dtype=torch.float64)], dim=1)
        y = outputs.double()
        for half, chosen in ((True, first), (False, ~first)):
            own, target = x[chosen], y[chosen]
            new = own.T @ own, own.T @ target, target.square().sum()
            self._sums[half] = new if half not in self._sums else _added(self._sums[half], new)

    def result(self) -> dict[str, Any]:
        """R^2 on the other half, with the number of tokens of both.

        R^2 is None where it says nothing: the fitted half has fewer than `FEWEST` tokens for each of the D + 1 numbers
        that a channel's map has, or the outputs of the other half do not differ.
        """
        (gram, cross, _), (held, held_cross, squares) = self._sums[True], self._sums[False]
        count, other = int(gram[-1, -1]), int(held[-1, -1])
        numbers: dict[str, Any] = {"r2": None, "fitted": count, "held_out": other}
        if count < FEWEST * len(gram) or not other:
            return numbers
        weights = torch.linalg.pinv(gram, hermitian=True) @ cross
        errors = squares - 2 * (weights * held_cross).sum() + (weights * (held @ weights)).sum()
        spread = squares - held_cross[-1].square().sum() / other
        if spread > 1e-12 * squares:
            numbers["r2"] = float(1 - errors / spread)
        return numbers


def _added(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (a + b for a, b in zip(one, other, strict=True))
    return first, second, third
