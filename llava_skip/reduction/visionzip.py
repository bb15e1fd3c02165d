"""`visionzip`: dominant tokens by the class token's attention, and means of the rest (VisionZip, arXiv 2412.04467)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llava_skip.reduction.choosing import ascending, best, cosines, others, take
from llava_skip.reduction.method import Selection
from llava_skip.vision.clip import mean_keys

if TYPE_CHECKING:
    from llava_skip.configuration import LlavaSkipConfig
    from llava_skip.reduction.config import ReductionConfig
    from llava_skip.vision.view import View


def shares(count: int) -> tuple[int, int]:
    """Of T rows the dominant and the contextual ones: 10 of 64 are contextual, as in the paper's 54 + 10 of 64."""
    contextual = (10 * count + 32) // 64
    return count - contextual, contextual


def zipped(features: Tensor, class_scores: Tensor, keys: Tensor, dominant: int, contextual: int) -> Tensor:
    """The rows before the projector.

    Dominant are the class token and the patches with most attention of it, in the order of the image. Of the n others
    every max(1, floor(n / contextual))-th is a target. Each of the rest goes to the target with the most similar key;
    a contextual row is its target plus the mean of what went to it.

    Args:
        features: [N, 1 + P, C].
        class_scores: [N, H, P].
        keys: [N, 1 + P, E], the mean over heads.
        dominant: rows, with the class token.
        contextual: rows.

    Returns:
        [N, dominant + contextual, C].
    """
    tokens = features.shape[1]
    patches = 1 + ascending(best(class_scores.sum(dim=1), dominant - 1))
    kept = nn.functional.pad(patches, (1, 0))  # the class token has the index 0
    if not contextual:
        return take(features, kept)
    left = others(kept, tokens)
    count = tokens - dominant
    targets = torch.arange(0, count, max(1, count // contextual), device=left.device)[:contextual]
    rest = others(targets.unsqueeze(0), count)[0]
    similar = cosines(take(keys, left[:, rest]), take(keys, left[:, targets]))
    assigned = nn.functional.one_hot(similar.argmax(dim=-1), contextual).transpose(1, 2).to(features.dtype)
    means = assigned @ take(features, left[:, rest]) / assigned.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.cat([take(features, kept), take(features, left[:, targets]) + means], dim=1)


class VisionZip(Selection):
    """The class token is one of the rows, so that everything is P + 1 rows."""

    name = "visionzip"
    reads_patches = True

    def most_rows(self, tokens: int) -> int:
        """All patches and the class token."""
        return tokens + 1

    def states(self, reduction: ReductionConfig, config: LlavaSkipConfig) -> tuple[int, ...]:
        """What enters the layer of the features."""
        return (config.used_tower_layers - 1,)

    def select(self, view: View, reduction: ReductionConfig) -> Tensor:
        """[N, T, D]."""
        keys = mean_keys(*view.entering(view.layer))
        return view.projector(zipped(view.features, view.class_scores, keys, *shares(reduction.count)))
