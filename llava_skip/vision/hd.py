"""LLaVA-HD: a thumbnail and the tiles of a grid, each through the tower; the thumbnail is retained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_skip.vision.clip import ClipTower
from llava_skip.vision.front_end import Box, FrontEnd, Group, Place
from llava_skip.vision.llava import patch_boxes, select_patches
from llava_skip.vision.tiling import TilingImageProcessorPil
from llava_skip_base.errors import UserError

if TYPE_CHECKING:
    from llava_skip.configuration import LlavaSkipConfig, SkipConfig
    from llava_skip.modeling import LlavaSkipModel


class HdFrontEnd(FrontEnd):
    """Up to `max_tiles` tiles and a thumbnail; with `pad_pictures` all images have the same number of crops."""

    name = "hd"
    cuts_tiles = True
    gives_patches = True

    def check(self, config: LlavaSkipConfig) -> None:
        """`max_tiles` is at least 1."""
        super().check(config)
        if config.max_tiles < 1:
            raise UserError(f"max_tiles is {config.max_tiles}; it must be at least 1.")

    def check_skip(self, config: LlavaSkipConfig, skip: SkipConfig) -> None:
        """The thumbnail is what is retained; an image has at least two crops, the thumbnail and a tile."""
        if skip.retained != config.patches:
            raise UserError(
                f"skip.retained is {skip.retained}; front_end 'hd' retains the thumbnail, {config.patches} tokens: set "
                "it to that."
            )
        skip.check_patches(self.visual_tokens(config, 2))

    def most_crops(self, config: LlavaSkipConfig) -> int:
        """A thumbnail and the largest grid; a square is cut to the largest square grid."""
        return 1 + (int(config.max_tiles**0.5) ** 2 if config.pad_pictures else config.max_tiles)

    def visual_tokens(self, config: LlavaSkipConfig, crops: int) -> int:
        """The patches of all crops."""
        return config.patches * crops

    def encode(
        self,
        tower: ClipTower,
        projector: nn.Module,
        pixel_values: Tensor,
        crop_counts: Sequence[int] | None,
        config: LlavaSkipConfig,
    ) -> list[Group]:
        """The tower runs once over the crops of all images; images with equally many crops are a group.

        Raises:
            UserError: `crop_counts` is missing, or does not add up.
        """
        counts = list(crop_counts or ())
        if sum(counts) != pixel_values.shape[0]:
            raise UserError(
                f"front_end 'hd' has {pixel_values.shape[0]} crops, and crop_counts says {counts or 'nothing'}: give "
                "the crop_counts of the processor along with its pixel_values."
            )
        images = self.crop_tokens(tower, projector, pixel_values, config).split(counts)
        groups = []
        for count in sorted(set(counts)):
            indices = [index for index, crops in enumerate(counts) if crops == count]
            groups.append(Group(indices, torch.stack([images[index] for index in indices]).flatten(1, 2)))
        return groups

    def tokens(self, tower: ClipTower, projector: nn.Module, pixel_values: Tensor, config: LlavaSkipConfig) -> Tensor:
        """Crops [n, 3, side, side] -> their patches [n, P, D]."""
        features, _ = tower(pixel_values, config.vision_feature_layer)
        return projector(select_patches(features, config))

    def blank(self, config: LlavaSkipConfig) -> tuple[Tensor, Sequence[int] | None]:
        """A thumbnail and one tile."""
        side = config.vision_config.image_size
        return torch.zeros(2, 3, side, side), [2]

    def image_processor(self, config: LlavaSkipConfig, sizes: dict[str, Any]) -> Any:
        """One that cuts tiles."""
        return TilingImageProcessorPil(config.max_tiles, **sizes, do_pad=config.pad_pictures)

    def crop_length(self, config: LlavaSkipConfig) -> int | None:
        """A dense model takes the tokens of each crop; a skipping one the same number for every image."""
        return config.image_length(1) if config.skip is None else None

    def scale_skip(self, skip: SkipConfig, scale: float, patches: int) -> SkipConfig:
        """In proportion; the skipped tokens are those of the tiles."""
        skipped = max(1, min(round(skip.skipped * scale), patches))
        return replace(skip, retained=max(1, round(skip.retained * scale)), skipped=skipped)

    def retained_boxes(self, model: LlavaSkipModel, crops: Tensor) -> tuple[list[Box], str]:
        """The whole thumbnail."""
        side, retained = model.config.vision_config.image_size, model.config.skip_config.retained
        return [(0, 0, side, side)], f"retained: the {retained} tokens of the thumbnail; tiles are skipped"

    def places(self, model: LlavaSkipModel, crops: Tensor) -> list[Place]:
        """The patches of the thumbnail, then those of each tile."""
        return [Place(crop, box) for crop in range(len(crops)) for box in patch_boxes(model.config)]
