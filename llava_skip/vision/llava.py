"""LLaVA: the patches of one CLIP layer; those with the most attention from the class token come first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from llava_skip.tokens import retained_first, retained_order
from llava_skip.vision.clip import ClipTower
from llava_skip.vision.front_end import Box, FrontEnd, Place, grid_boxes

if TYPE_CHECKING:
    from llava_skip.configuration import LlavaSkipConfig
    from llava_skip.modeling import LlavaSkipModel


class LlavaFrontEnd(FrontEnd):
    """One crop, LLaVA's MLP projector."""

    name = "llava"
    is_llava_hf = True
    gives_patches = True

    def ranks(self, config: LlavaSkipConfig) -> bool:
        """A skipping model ranks them."""
        return config.skip is not None

    def tokens(self, tower: ClipTower, projector: nn.Module, pixel_values: Tensor, config: LlavaSkipConfig) -> Tensor:
        """[N, 3, side, side] -> [N, P, D], the retained first."""
        skip = config.skip_config
        features, scores = tower(pixel_values, config.vision_feature_layer, rank=skip is not None)
        patches = select_patches(features, config)
        return projector(patches if skip is None else retained_first(patches, scores, skip.retained))

    def retained_boxes(self, model: LlavaSkipModel, crops: Tensor) -> tuple[list[Box], str]:
        """The retained patches."""
        config, vision = model.config, model.config.vision_config
        retained = config.skip_config.retained
        _, scores = model.vision_tower(crops[:1], config.vision_feature_layer, rank=True)
        chosen = set(retained_order(scores, retained)[0, :retained].tolist())
        cells = grid_boxes(vision.image_size, vision.patch_size)
        boxes = [box for index, box in enumerate(cells) if index in chosen]
        return boxes, f"retained: the {retained} patches that the class token attends to most"

    def places(self, model: LlavaSkipModel, crops: Tensor) -> list[Place]:
        """The cells of the patches, the retained first."""
        config = model.config
        cells = [Place(0, box) for box in patch_boxes(config)]
        if config.skip_config is None:
            return cells
        _, scores = model.vision_tower(crops[:1], config.vision_feature_layer, rank=True)
        return [cells[index] for index in retained_order(scores, config.skip_config.retained)[0].tolist()]


def select_patches(features: Tensor, config: LlavaSkipConfig) -> Tensor:
    """Features [N, 1 + P, C] -> [N, P, C]; with `vision_feature_select_strategy` "full" the class token stays."""
    return features if config.vision_feature_select_strategy == "full" else features[:, 1:]


def patch_boxes(config: LlavaSkipConfig) -> list[Box]:
    """What each token of a crop shows; a class token that stays (see `select_patches`) the whole crop."""
    side = config.vision_config.image_size
    cells = grid_boxes(side, config.vision_config.patch_size)
    return [(0, 0, side, side), *cells] if config.vision_feature_select_strategy == "full" else cells
