"""`vispruner`: patches of much attention, and of the rest those unlike each other (VisPruner, arXiv 2412.01818v3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from llava_skip.reduction.choosing import ascending, best, cosines
from llava_skip.reduction.method import Option, Selection

if TYPE_CHECKING:
    from llava_skip.configuration import LlavaSkipConfig
    from llava_skip.reduction.config import ReductionConfig
    from llava_skip.vision.view import View


def thinned(similar: Tensor, order: Tensor, count: int, step: int) -> Tensor:
    """What is left of a list when tokens that resemble others of it leave, `step` in each round.

    A round compares every second token, from the first on, with the others of the list. The tokens whose largest
    similarity is largest leave; the rest of that half comes first in the next round, the most similar first.

    Args:
        similar: [N, P, P] similarities.
        order: [N, n] the list, indices into P.
        count: tokens that are left, at least 1.
        step: tokens that leave in a round, fewer in the last.

    Returns:
        [N, count] indices.
    """
    while (length := order.shape[1]) > count:
        half, other = order[:, ::2], order[:, 1::2]
        rows = similar.gather(1, half.unsqueeze(-1).expand(-1, -1, similar.shape[2]))
        nearest = rows.gather(2, other.unsqueeze(1).expand(-1, half.shape[1], -1)).amax(dim=-1)
        half = half.gather(1, best(nearest, half.shape[1]))
        leave = min(step, length - count, half.shape[1])
        order = torch.cat([half[:, leave:], other], dim=1)
    return order


@torch.no_grad()
def important_and_diverse(class_scores: Tensor, patches: Tensor, count: int, ratio: float) -> Tensor:
    """Indices [N, T], ascending: floor(T ratio) patches by attention, the others by `thinned`.

    Args:
        class_scores: [N, H, P].
        patches: [N, P, C].
        count: T.
        ratio: share of the important ones.
    """
    important = int(count * ratio)
    order = best(class_scores.mean(dim=1), patches.shape[1])
    first, rest = order[:, :important], order[:, important:]
    if important == count:
        rest = rest[:, :0]
    elif count - important < rest.shape[1]:
        step = max(1, round(8 * patches.shape[1] / 576))
        rest = thinned(cosines(patches, patches), rest, count - important, step)
    return ascending(torch.cat([first, rest], dim=1))


class VisPruner(Selection):
    """8 of 576 tokens leave in a round, as many in proportion of another number."""

    name = "vispruner"
    reads_patches = True
    options: ClassVar[Mapping[str, Option]] = {"ratio": Option(0.5, most=1, whole=False)}

    def states(self, reduction: ReductionConfig, config: LlavaSkipConfig) -> tuple[int, ...]:
        """What enters the layer of the features."""
        return (config.used_tower_layers - 1,)

    def select(self, view: View, reduction: ReductionConfig) -> Tensor:
        """[N, T, D]."""
        return view.keep(important_and_diverse(view.class_scores, view.patches, reduction.count, reduction["ratio"]))
