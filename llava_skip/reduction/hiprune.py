"""`hiprune`: patches that all tokens attend to, in a middle and in the last layer (HiPrune, arXiv 2508.00553)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from llava_skip.reduction.choosing import ascending, best
from llava_skip.reduction.method import Option, Selection
from llava_skip.vision.clip import mean_attention
from llava_skip_base.errors import UserError

if TYPE_CHECKING:
    from llava_skip.configuration import LlavaSkipConfig
    from llava_skip.reduction.config import ReductionConfig
    from llava_skip.vision.view import View


@torch.no_grad()
def anchors_and_registers(middle: Tensor, last: Tensor, count: int, anchors: int) -> Tensor:
    """Indices [N, T], ascending.

    The `anchors` patches with most attention in the middle layer are kept with their neighbours, the indices 1 and
    `side` before and behind, limited to 0..P - 1 (so that the end of a row has the next row's first as a neighbour).
    The patches with most attention in the last layer fill up to T.

    Args:
        middle: [N, P] attention in the middle layer, P = side * side.
        last: [N, P] attention in the last layer.
        count: T.
        anchors: how many.
    """
    patches = last.shape[1]
    side = round(patches**0.5)
    chosen = best(middle, anchors)
    forced = torch.cat([chosen + step for step in (0, -1, 1, -side, side)], dim=1).clamp(0, patches - 1)
    return ascending(best(last.scatter(1, forced, torch.inf), count))


class HiPrune(Selection):
    """round(T alpha / 5) anchors by the attention of tower layer `object_layer` (from 1 on)."""

    name = "hiprune"
    reads_patches = True
    options: ClassVar[Mapping[str, Option]] = {
        "alpha": Option(0.1, most=1, whole=False),
        "object_layer": Option(least=1),
    }

    def object_layer(self, reduction: ReductionConfig, config: LlavaSkipConfig) -> int:
        """The middle layer, counted from 1; the 9th of 24, in proportion for another tower."""
        return reduction["object_layer"] or max(1, round(9 * config.vision_config.num_hidden_layers / 24))

    def check(self, reduction: ReductionConfig, config: LlavaSkipConfig) -> None:
        """The middle layer is one of those before the features."""
        super().check(reduction, config)
        if (layer := self.object_layer(reduction, config)) > config.used_tower_layers:
            raise UserError(
                f"reduction {reduction} reads the attention of tower layer {layer}, but the features come out of layer "
                f"{config.used_tower_layers}: give a smaller object_layer."
            )

    def states(self, reduction: ReductionConfig, config: LlavaSkipConfig) -> tuple[int, ...]:
        """What enters the middle layer and the layer of the features."""
        return (self.object_layer(reduction, config) - 1, config.used_tower_layers - 1)

    def select(self, view: View, reduction: ReductionConfig) -> Tensor:
        """[N, T, D]."""
        count, alpha = reduction.count, reduction["alpha"]
        middle = mean_attention(*view.entering(self.object_layer(reduction, view.config) - 1))
        last = mean_attention(*view.entering(view.layer))
        return view.keep(anchors_and_registers(middle, last, count, round(count * alpha / 5)))
