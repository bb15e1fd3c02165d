"""Choosing rows of tensors: what several methods share. Without gradient, without looking at values on the host.

Shapes: N crops, P tokens of a crop, T of them that are chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def best(scores: Tensor, count: int) -> Tensor:
    """Indices [N, T] of the `count` largest scores [N, P], the largest first; of equal ones the earlier is first."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count]


def ascending(indices: Tensor) -> Tensor:
    """Indices [N, T] in the order of the image."""
    return indices.sort(dim=1).values


def take(rows: Tensor, indices: Tensor) -> Tensor:
    """Rows [N, P, ...] at indices [N, T] -> [N, T, ...]."""
    shape = indices.shape + (1,) * (rows.ndim - 2)
    return rows.gather(1, indices.view(shape).expand(*indices.shape, *rows.shape[2:]))


@torch.no_grad()
def others(indices: Tensor, tokens: int) -> Tensor:
    """The indices [N, P - T] of 0..tokens - 1 that are not among [N, T], ascending."""
    is_chosen = torch.zeros(indices.shape[0], tokens, dtype=torch.uint8, device=indices.device)
    return is_chosen.scatter_(1, indices, 1).argsort(dim=1, stable=True)[:, : tokens - indices.shape[1]]


def spread(count: int, length: int, device: torch.device) -> Tensor:
    """`count` indices [count] into a list of `length`, evenly spaced: floor((2 i + 1) length / (2 count))."""
    return (2 * torch.arange(count, device=device) + 1) * length // (2 * count)


@torch.no_grad()
def cosines(left: Tensor, right: Tensor) -> Tensor:
    """Cosine similarities [N, P, Q] of [N, P, C] and [N, Q, C], in float32."""
    unit = (nn.functional.normalize(tensor.float(), dim=-1) for tensor in (left, right))
    return next(unit) @ next(unit).transpose(1, 2)
