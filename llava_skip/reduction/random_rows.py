"""`random`: T tokens of each crop by lot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from llava_skip.reduction.choosing import ascending, best
from llava_skip.reduction.method import Option, Selection

if TYPE_CHECKING:
    from llava_skip.reduction.config import ReductionConfig
    from llava_skip.vision.view import View

_STEP = -7046029254386353131  # 0x9E3779B97F4A7C15
_FACTORS = ((30, -4658895280553007687), (27, -7723592293110705685))  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mixed(numbers: Tensor) -> Tensor:
    """SplitMix64's finaliser of 64-bit numbers (Steele, Lea, Flood: Fast splittable pseudorandom number generators)."""
    for shift, factor in _FACTORS:
        numbers = (numbers ^ _shifted(numbers, shift)) * factor
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, shift: int) -> Tensor:
    """Shifted to the right with zeros coming in."""
    return (numbers >> shift) & ((1 << (64 - shift)) - 1)


@torch.no_grad()
def lots(pixel_values: Tensor, tokens: int, seed: int) -> Tensor:
    """A 64-bit number for each token of each crop, [N, tokens].

    They follow from the seed and the crop's own pixels, so that a crop gets the same in each batch, on each device and
    in each run, and two crops get different ones. The sum of the bits of the pixels is exact in any order.

    Args:
        pixel_values: [N, 3, side, side].
        tokens: P.
        seed: of the draw.
    """
    content = pixel_values.float().view(torch.int32).flatten(1).long().sum(dim=1, keepdim=True)
    places = torch.arange(1, tokens + 1, device=pixel_values.device)
    start = (seed * _STEP + 2**63) % 2**64 - 2**63  # wraps around as the tensors' products do
    return mixed(mixed(content + start) + places * _STEP)


class RandomRows(Selection):
    """The T tokens with the largest lots, in the order of the image."""

    name = "random"
    options: ClassVar[Mapping[str, Option]] = {"seed": Option(0, most=2**31)}

    def select(self, view: View, reduction: ReductionConfig) -> Tensor:
        """[N, T, D]."""
        numbers = lots(view.pixel_values, view.count, reduction["seed"])
        return view.keep(ascending(best(numbers, reduction.count)))
