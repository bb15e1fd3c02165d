"""`prumerge+`: patches by attention and by place, each with what resembles it (LLaVA-PruMerge+, arXiv 2403.15388)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava_skip.reduction.choosing import best, cosines, others, spread, take
from llava_skip.reduction.method import Selection
from llava_skip.vision.clip import class_query_and_keys

if TYPE_CHECKING:
    from llava_skip.configuration import LlavaSkipConfig
    from llava_skip.reduction.config import ReductionConfig
    from llava_skip.vision.view import View


@torch.no_grad()
def one_head(query: Tensor, keys: Tensor) -> Tensor:
    """Attention [N, P] of the class token's query [N, 1, C] to the patches among keys [N, 1 + P, C], as one head."""
    scores = query.float() @ keys.float().transpose(1, 2) / query.shape[-1] ** 0.5
    return scores.softmax(dim=-1)[:, 0, 1:]


@torch.no_grad()
def kept_patches(attention: Tensor, count: int) -> Tensor:
    """Indices [N, count]: round(count / 4) with most attention [N, P], the largest first, then by place.

    The others are evenly spaced in the list of patches that attention has not chosen.
    """
    top = best(attention, max(min(1, count), round(count / 4)))
    left = others(top, attention.shape[1])
    return torch.cat([top, left[:, spread(count - top.shape[1], left.shape[1], left.device)]], dim=1)


def merged(patches: Tensor, attention: Tensor, keys: Tensor, kept: Tensor, similar: int) -> Tensor:
    """The rows before the projector.

    A row is its patch plus the patches with the `similar` most similar keys, kept ones included, each times its
    attention. One more row is the sum of the patches that are not kept, each times its attention.

    Args:
        patches: [N, P, C].
        attention: [N, P].
        keys: [N, P, C].
        kept: [N, K] indices.
        similar: patches that are added to each row.

    Returns:
        [N, K + 1, C].
    """
    likeness = cosines(take(keys, kept), keys).scatter(2, kept.unsqueeze(-1), -torch.inf)
    nearest = likeness.topk(similar, dim=-1).indices
    # A product with the weights instead of gathered rows: [N, K, P], not [N, K, similar, C].
    weights = torch.zeros_like(likeness).scatter(2, nearest, 1.0) * attention.unsqueeze(1)
    dropped = attention.scatter(1, kept, 0.0).unsqueeze(1)
    sums = torch.cat([weights, dropped], dim=1).to(patches.dtype) @ patches
    return torch.cat([sums[:, :-1] + take(patches, kept), sums[:, -1:]], dim=1)


class PruMergePlus(Selection):
    """T - 1 patches and the row of the others; 32 of 576 patches are added to each, as many in proportion."""

    name = "prumerge+"
    reads_patches = True

    def most_rows(self, tokens: int) -> int:
        """All patches, and the row of the others, which is then 0."""
        return tokens + 1

    def tower_layers(self, reduction: ReductionConfig, config: LlavaSkipConfig) -> int:
        """All: the last one has the queries and keys."""
        return config.vision_config.num_hidden_layers

    def states(self, reduction: ReductionConfig, config: LlavaSkipConfig) -> tuple[int, ...]:
        """What enters the last layer."""
        return (config.vision_config.num_hidden_layers - 1,)

    def select(self, view: View, reduction: ReductionConfig) -> Tensor:
        """[N, T, D]."""
        query, keys = class_query_and_keys(*view.entering(view.config.vision_config.num_hidden_layers - 1))
        attention = one_head(query, keys)
        similar = min(max(1, round(32 * view.count / 576)), view.count - 1)
        kept = kept_patches(attention, reduction.count - 1)
        return view.projector(merged(view.patches, attention, keys[:, 1:], kept, similar))
