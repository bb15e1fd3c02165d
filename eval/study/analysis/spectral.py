"""Largest singular values of weights, as upper bounds, and largest gains of Jacobians, as estimates.

docs/theory.md has the proofs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

EXACT_SIDE = 1024
"""Up to this smaller side a matrix is decomposed."""
TOLERANCE = 0.05
"""How far the upper bound of a larger matrix may be above what power iteration found, relative."""
FAILURE = 1e-9
"""Probability that the upper bound of one larger matrix is too low."""


class SingularValue(NamedTuple):
    """The largest singular value lies between `lower` and `upper`, which are equal where it is known."""

    lower: float
    upper: float


def largest_singular_value(
    weight: Tensor, exact_side: int = EXACT_SIDE, tolerance: float = TOLERANCE, seed: int = 0
) -> SingularValue:
    """The largest singular value of a matrix [M, N].

    A small matrix: the largest eigenvalue of its smaller Gram matrix, in float64. A larger one: power iteration, which
    comes from below, and a factor above it that a random start misses with probability `FAILURE` at most.
    """
    weight = weight.detach()
    weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
    if weight.shape[0] <= exact_side:
        exact = weight.to("cpu", torch.float64)
        value = math.sqrt(max(float(torch.linalg.eigvalsh(exact @ exact.T)[-1]), 0.0))
        return SingularValue(value, value)
    weight = weight.float()
    lower, upper = power_iteration(weight, tolerance, seed)
    return SingularValue(lower, min(upper, float(torch.linalg.vector_norm(weight))))


def power_iteration(weight: Tensor, tolerance: float = TOLERANCE, seed: int = 0) -> SingularValue:
    """Power iteration on B = W W^T for W [M, N], from a start v that is uniform on the sphere.

    With s the largest singular value and u its vector, |B^q v| >= s^(2q) |v.u|, and |v.u| < t has a probability of at
    most t sqrt(2 M / pi). So s <= |B^q v|^(1/2q) t^(-1/2q) but for that probability; q is chosen so that the last
    factor is 1 + `tolerance` (bound of the start: J. D. Dixon, SIAM J. Numer. Anal. 20(4), 1983).
    """
    side = weight.shape[0]
    start = FAILURE / math.sqrt(2 * side / math.pi)
    steps = math.ceil(-math.log(start) / (2 * math.log1p(tolerance)))
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(side, generator=generator).to(weight)
    vector = vector / vector.norm()
    logarithm, lower = 0.0, 0.0
    for _ in range(steps):
        across = weight.T @ vector
        vector = weight @ across
        length = float(vector.norm())
        if length == 0.0:
            return SingularValue(0.0, 0.0)
        lower, logarithm = float(across.norm()), logarithm + math.log(length)
        vector = vector / length
    return SingularValue(lower, math.exp((logarithm - math.log(start)) / (2 * steps)))


def largest_gain(
    function: Callable[[Tensor], Tensor],
    point: Tensor,
    start: Tensor,
    inside: Tensor,
    outside: Tensor,
    dims: tuple[int, ...],
    steps: int,
) -> Tensor:
    """Norms of the blocks of a function's Jacobian J at a point, one for each index that is not in `dims`.

    Power iteration on P J^T Q J P with P = `inside` and Q = `outside`; it grows to the norm of Q J P from below, and
    after the first step it is at least the gain of `start`.

    Args:
        function: [..., D] -> [..., D]; entries of different indices outside `dims` must not mix.
        point: where.
        start: first direction, as `point`.
        inside: directions that are allowed, 0 or 1, broadcast to `point`.
        outside: parts of the result that count, 0 or 1, broadcast to `point`.
        dims: dimensions that a norm is taken over.
        steps: of power iteration, each one product with J and one with its transpose.
    """
    pull_back = torch.func.vjp(function, point)[1]
    direction = _unit(start * inside, dims)
    gain = torch.zeros(())
    for _ in range(steps):
        pushed = torch.func.jvp(function, (point,), (direction,))[1] * outside
        gain = torch.linalg.vector_norm(pushed, dim=dims)
        direction = _unit(pull_back(pushed)[0] * inside, dims)
    return gain


def _unit(direction: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Of length 1; zeros stay zeros."""
    length = torch.linalg.vector_norm(direction, dim=dims, keepdim=True)
    return direction / length.clamp_min(torch.finfo(direction.dtype).tiny)
