"""Chain of sight: a resampler's queries read layers of the tower in windows; the coarse scales are retained."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import CLIPVisionConfig

from llava_skip.products import Products, linear
from llava_skip.vision.clip import ClipTower
from llava_skip.vision.front_end import Box, FrontEnd, Place, grid_boxes, split_box
from llava_skip.vision.resampler import ChainOfSightResampler, ResamplerConfig, resampler_products
from llava_skip_base.errors import UserError

if TYPE_CHECKING:
    from llava_skip.configuration import LlavaSkipConfig, SkipConfig
    from llava_skip.modeling import LlavaSkipModel
    from llava_skip.presets import Preset


class ChainOfSightFrontEnd(FrontEnd):
    """The field `resampler` of the configuration has the scales, a `ResamplerConfig`."""

    name = "cos"
    llava_projector = False
    reads_one_layer = False

    def check(self, config: LlavaSkipConfig) -> None:
        """`resampler` is given and fits the tower."""
        if config.resampler is None:
            raise UserError("resampler belongs to front_end 'cos': give both or neither.")
        vision = config.vision_config
        _resampler(config).check(vision.image_size // vision.patch_size, vision.num_hidden_layers)

    def used_tower_layers(self, config: LlavaSkipConfig) -> int:
        """Up to the last layer that is read."""
        return max(_resampler(config).hidden_states)

    def visual_tokens(self, config: LlavaSkipConfig, crops: int) -> int:
        """The queries of all scales."""
        return sum(_resampler(config).queries)

    def projector_products(self, config: LlavaSkipConfig, crops: float) -> Products:
        """Those of the resampler."""
        vision, resampler = config.vision_config, _resampler(config)
        features = (vision.image_size // vision.patch_size) ** 2
        readers = resampler_products(resampler, features, vision.hidden_size)
        last = linear(sum(resampler.queries), resampler.width, config.text_config.hidden_size)
        return (readers + Products(weights=last)) * crops

    def projector_bytes(self, config: LlavaSkipConfig, crops: float, element: int) -> int:
        """Of the resampler: of each scale and level the features with their keys and values, and the queries."""
        vision, resampler = config.vision_config, _resampler(config)
        features = (vision.image_size // vision.patch_size) ** 2 * (2 * vision.hidden_size + 2 * resampler.width)
        numbers = sum(features + 16 * queries * resampler.width for queries in resampler.queries)
        return round(crops * element * (len(resampler.levels) * numbers + 2 * sum(resampler.queries) * resampler.width))

    def build_projector(self, config: LlavaSkipConfig) -> nn.Module:
        """The resampler."""
        widths = config.vision_config.hidden_size, config.text_config.hidden_size
        return ChainOfSightResampler(_resampler(config), *widths)

    def tokens(self, tower: ClipTower, projector: nn.Module, pixel_values: Tensor, config: LlavaSkipConfig) -> Tensor:
        """[N, 3, side, side] -> queries [N, P, D], scale after scale."""
        states = tower.hidden_states(pixel_values, _resampler(config).hidden_states)
        return projector([state[:, 1:] for state in states])

    def scale_skip(self, skip: SkipConfig, scale: float, patches: int) -> SkipConfig:
        """The paper's numbers: the queries do not depend on the tower."""
        return skip

    def preset_fields(self, preset: Preset, vision: CLIPVisionConfig, numbers: dict[str, Any]) -> dict[str, Any]:
        """The resampler of the size, and the numbers for its queries."""
        side, divisor = vision.image_size // vision.patch_size, numbers["queries_divided_by"]
        windows = numbers.get("windows", {}).get(preset.name, preset.windows)
        resampler = ResamplerConfig(
            windows=tuple(side // cells for cells in windows),
            queries=tuple(queries // divisor for queries in preset.queries),
            levels=numbers["levels"],
            width=numbers["width"],
        )
        skip = None if preset.skip is None else _divide(preset.skip, divisor).to_dict()
        return {"resampler": resampler.to_dict(), "skip": skip}

    def preset_skip(self, preset: Preset, config: LlavaSkipConfig) -> SkipConfig | None:
        """The preset's numbers, divided by as much as the model has fewer queries."""
        divisor = sum(preset.queries) // sum(_resampler(config).queries)
        return None if preset.skip is None else _divide(preset.skip, divisor)

    def fits(self, preset: Preset, config: LlavaSkipConfig) -> bool:
        """Whether the preset's queries are a multiple of the model's."""
        return super().fits(preset, config) and sum(preset.queries) % sum(_resampler(config).queries) == 0

    def describe(self, config: LlavaSkipConfig) -> str:
        """With the number of queries."""
        return f"{super().describe(config)} and {sum(_resampler(config).queries)} queries"

    def retained_boxes(self, model: LlavaSkipModel, crops: Tensor) -> tuple[list[Box], str]:
        """The windows of the scales that have retained queries."""
        vision, resampler = model.config.vision_config, _resampler(model.config)
        left, boxes, scales = model.config.skip_config.retained, [], []
        for window, queries in zip(resampler.windows, resampler.queries, strict=True):
            if left > 0:
                boxes += grid_boxes(vision.image_size, window * vision.patch_size)
                scales.append(f"{min(left, queries)} of {queries} queries on windows of {window} x {window} features")
            left -= queries
        return boxes, "retained: " + ", ".join(scales)

    def places(self, model: LlavaSkipModel, crops: Tensor) -> list[Place]:
        """The windows, scale after scale; the queries of a window share it in equal parts, only to be drawn."""
        vision, resampler = model.config.vision_config, _resampler(model.config)
        places = []
        for window, queries in zip(resampler.windows, resampler.queries, strict=True):
            boxes = grid_boxes(vision.image_size, window * vision.patch_size)
            places += [Place(0, part) for box in boxes for part in split_box(box, queries // len(boxes))]
        return places


def _resampler(config: LlavaSkipConfig) -> ResamplerConfig:
    resampler = config.resampler_config
    assert resampler is not None  # `check` has seen it
    return resampler


def _divide(skip: SkipConfig, divisor: int) -> SkipConfig:
    """The numbers for `divisor` times fewer queries."""
    spans = tuple((first // divisor, end // divisor) for first, end in skip.spans)
    return replace(skip, retained=skip.retained // divisor, skipped=skip.skipped // divisor, summaries=spans)
