"""What makes the blocks of images: tower, projector and summary layer, for a model of transformers or of an engine.

Shapes: N images of a batch, P visual tokens of an image, L tokens of its block, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.tokens import SummaryLayer, merge_tokens
from llava_skip.vision import get_front_end
from llava_skip.vision.clip import ClipTower
from llava_skip.vision.front_end import FrontEnd
from llava_skip.vision.stored import Pixels, TowerFeatures
from llava_skip_base.errors import UserError


class ImageBlocks:
    """Placed before an `nn.Module`, which calls `build_image_modules` in its `__init__`.

    Attributes:
        config: of the model.
        front_end: how images become visual tokens.
        vision_tower: the tower.
        multi_modal_projector: what the front end built.
        summary: the layer that makes summaries; None if there are none.
    """

    config: Any
    front_end: FrontEnd
    vision_tower: ClipTower
    multi_modal_projector: nn.Module
    summary: SummaryLayer | None

    def build_image_modules(self, config: LlavaSkipConfig) -> None:
        """Make the modules of a configuration, with initial weights."""
        self.vision_tower = ClipTower(config.vision_config)
        self.front_end = get_front_end(config.front_end)
        self.multi_modal_projector = self.front_end.build_projector(config)
        self.summary = _build_summary(config)

    def encode_images(
        self,
        pixel_values: Pixels,
        crop_counts: Tensor | Sequence[int] | None = None,
        config: LlavaSkipConfig | None = None,
    ) -> Tensor | list[Tensor]:
        """Images -> the blocks [N, L, D] that replace their image tokens.

        It is a list of N tensors [L, D] where images have different lengths. Arguments as those of
        `FrontEnd.encode`; `crop_counts` that is a tensor is read.

        Raises:
            UserError: pixels that are bytes still.
        """
        crop_counts = crop_counts.tolist() if isinstance(crop_counts, Tensor) else crop_counts
        tower, projector = self.vision_tower, self.multi_modal_projector
        if isinstance(pixel_values, TowerFeatures):
            tower, pixel_values = pixel_values.in_place_of(tower)
        elif pixel_values.dtype == torch.uint8:
            raise UserError(
                "pixel_values are bytes: give values that are rescaled and normalised, as the processor gives them. "
                "llava_skip.vision.values.PixelValues.of(processor) makes them of bytes on the device."
            )
        groups = self.front_end.encode(tower, projector, pixel_values, crop_counts, config or self.config)
        blocks = [self.block(group.tokens) for group in groups]
        if len(groups) == 1:
            return blocks[0]
        rows = {
            p: r for group, block in zip(groups, blocks, strict=True) for p, r in zip(group.indices, block, strict=True)
        }
        return [rows[place] for place in sorted(rows)]

    def block(self, tokens: Tensor) -> Tensor:
        """Visual tokens [N, P, D], the retained first -> tokens of the language model [N, L, D]."""
        skip = self.config.skip_config
        if skip is None:
            return tokens
        retained, others = tokens.tensor_split([skip.retained], dim=1)
        return self.assemble(torch.cat([retained, merge_tokens(others, skip.skipped)], dim=1))

    def assemble(self, tokens: Tensor) -> Tensor:
        """Tokens of an image, retained then skipped, [N, R + S, D] -> its block with the summaries [N, L, D]."""
        assert self.config.skip_config is not None  # a dense model has no block
        pieces, start = [], 0
        for group, (first, end) in enumerate(self.config.skip_config.spans):
            assert self.summary is not None  # built if there are spans
            pieces += [tokens[:, start:end], self.summary(tokens[:, first:end], group)]
            start = end
        return torch.cat([*pieces, tokens[:, start:]], dim=1)


def _build_summary(config: LlavaSkipConfig) -> SummaryLayer | None:
    skip = config.skip_config
    if skip is None or not skip.spans:
        return None
    return SummaryLayer(config.text_config.hidden_size, skip.summary_start, len(skip.spans))
