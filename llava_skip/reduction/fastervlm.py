"""`fastervlm`: the T patches that the class token attends to most (FasterVLM, arXiv 2412.01818v1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from llava_skip.reduction.choosing import ascending, best
from llava_skip.reduction.method import Selection

if TYPE_CHECKING:
    from llava_skip.configuration import LlavaSkipConfig
    from llava_skip.reduction.config import ReductionConfig
    from llava_skip.vision.view import View


def most_attended(class_scores: Tensor, count: int) -> Tensor:
    """Indices [N, T], ascending, of the patches with most attention [N, H, P], the mean over heads."""
    return ascending(best(class_scores.mean(dim=1), count))


class FasterVlm(Selection):
    """By the attention of the layer that the features come out of; the class token is not kept."""

    name = "fastervlm"
    reads_patches = True

    def states(self, reduction: ReductionConfig, config: LlavaSkipConfig) -> tuple[int, ...]:
        """What enters the layer of the features."""
        return (config.used_tower_layers - 1,)

    def select(self, view: View, reduction: ReductionConfig) -> Tensor:
        """[N, T, D]."""
        return view.keep(most_attended(view.class_scores, reduction.count))
