"""The contract of a front end, which turns images into visual tokens, and the registry of all front ends.

Shapes: N images, P visual tokens of an image, D width of the language model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_skip.products import Products, linear
from llava_skip.reduction.method import Selection
from llava_skip.vision.clip import ClipTower
from llava_skip.vision.square import SquareImageProcessorPil
from llava_skip.vision.view import View
from llava_skip_base.errors import UserError

if TYPE_CHECKING:
    from llava_skip.configuration import LlavaSkipConfig, SkipConfig
    from llava_skip.modeling import LlavaSkipModel
    from llava_skip.presets import Preset

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""


class Place(NamedTuple):
    """Where a visual token looks: the number of the crop, and a box on it."""

    crop: int
    box: Box


class Group(NamedTuple):
    """Images with equally many visual tokens: their indices among all images, and tokens [n, P, D]."""

    indices: list[int]
    tokens: Tensor


class FrontEnd:
    """How images become visual tokens, the retained ones first; what is not overridden is LLaVA's way.

    A subclass without state is enough: `register_front_end` takes an instance, and `front_end` of a configuration is
    its name. The methods take the model's configuration, which has the numbers.

    Attributes:
        name: in configurations and presets.
        llava_projector: whether the projector has the weights of LLaVA's MLP, so that other front ends with it can
            take them over.
        is_llava_hf: whether a dense model is transformers' LLaVA and can be saved as one.
        cuts_tiles: whether the image processor cuts an image into crops.
        reads_one_layer: whether `vision_feature_layer` says which layer of the tower the features are.
        gives_patches: whether a crop's visual tokens, in a dense model, are the projected patches of that layer.
    """

    name: str
    llava_projector = True
    is_llava_hf = False
    cuts_tiles = False
    reads_one_layer = True
    gives_patches = False

    # --- configuration

    def check(self, config: LlavaSkipConfig) -> None:
        """Raise UserError for fields of the configuration that this front end does not have, or that do not fit."""
        if config.resampler is not None:
            raise UserError("resampler belongs to front_end 'cos': give both or neither.")

    def check_skip(self, config: LlavaSkipConfig, skip: SkipConfig) -> None:
        """Raise UserError if `skip` does not fit the visual tokens."""
        skip.check_patches(self.visual_tokens(config, 1))

    def used_tower_layers(self, config: LlavaSkipConfig) -> int:
        """Layers of the tower before the features that are used; later layers need no weights and are not trained."""
        return config.vision_feature_layer % (config.vision_config.num_hidden_layers + 1)

    def most_crops(self, config: LlavaSkipConfig) -> int:
        """The most crops that an image has."""
        return 1

    def visual_tokens(self, config: LlavaSkipConfig, crops: int) -> int:
        """P of an image with `crops` crops."""
        return config.patches

    # --- costs

    def ranks(self, config: LlavaSkipConfig) -> bool:
        """Whether the class token's attention ranks the patches."""
        return False

    def projector_products(self, config: LlavaSkipConfig, crops: float) -> Products:
        """Matrix products of the projector on `crops` crops."""
        tokens, width = crops * config.patches, config.text_config.hidden_size
        first = linear(tokens, config.vision_config.hidden_size, width)
        return Products(weights=first + linear(tokens, width, width), first=first)

    def projector_bytes(self, config: LlavaSkipConfig, crops: float, element: int) -> int:
        """Bytes that autograd saves of a trainable projector, with numbers of `element` bytes."""
        widths = config.vision_config.hidden_size + 2 * config.text_config.hidden_size
        return round(crops * config.patches * widths * element)

    # --- modules and tokens

    def build_projector(self, config: LlavaSkipConfig) -> nn.Module:
        """The module from the tower's features to the language model's width."""
        return LlavaMultiModalProjector(config)

    def encode(
        self,
        tower: ClipTower,
        projector: nn.Module,
        pixel_values: Tensor,
        crop_counts: Tensor | None,
        config: LlavaSkipConfig,
    ) -> list[Group]:
        """Visual tokens of all images, the retained first, in groups of equal length.

        Args:
            tower: the vision tower.
            projector: what `build_projector` made.
            pixel_values: [crops of all images, 3, side, side].
            crop_counts: [N], only if images have several crops.
            config: of the model.
        """
        tokens = self.crop_tokens(tower, projector, pixel_values, config)
        return [Group(list(range(tokens.shape[0])), tokens)]

    def crop_tokens(
        self, tower: ClipTower, projector: nn.Module, pixel_values: Tensor, config: LlavaSkipConfig
    ) -> Tensor:
        """Visual tokens of crops: those of `tokens`, or the T rows that a selecting reduction makes of each crop."""
        reduction = config.reduction_config
        if reduction is None or not isinstance(rule := reduction.rule, Selection):
            return self.tokens(tower, projector, pixel_values, config)
        view = View(self, tower, projector, pixel_values, config, rule.states(reduction, config))
        return rule.select(view, reduction)

    def tokens(self, tower: ClipTower, projector: nn.Module, pixel_values: Tensor, config: LlavaSkipConfig) -> Tensor:
        """Visual tokens [N, P, D] of images with one crop each, the retained first."""
        raise NotImplementedError

    def blank(self, config: LlavaSkipConfig) -> tuple[Tensor, Tensor | None]:
        """`pixel_values` and `crop_counts` of one black image."""
        side = config.vision_config.image_size
        return torch.zeros(1, 3, side, side), None

    # --- processor

    def image_processor(self, config: LlavaSkipConfig, sizes: dict[str, Any]) -> Any:
        """The image processor; `sizes` has the tower's size as `size` and `crop_size`."""
        return SquareImageProcessorPil(**sizes, do_pad=True)

    def crop_length(self, config: LlavaSkipConfig) -> int | None:
        """Image tokens of one crop if an image takes a multiple of it; None if all images take equally many."""
        return None

    # --- presets

    def scale_skip(self, skip: SkipConfig, scale: float, patches: int) -> SkipConfig:
        """The paper's numbers for a tower of `patches` patches, `scale` times those of the paper."""
        retained = max(1, round(skip.retained * scale))
        return replace(skip, retained=retained, skipped=max(1, min(round(skip.skipped * scale), patches - retained)))

    def preset_fields(self, preset: Preset, vision: CLIPVisionConfig, numbers: dict[str, Any]) -> dict[str, Any]:
        """Fields of the configuration that a preset decides; `numbers` are those of the size for this front end."""
        skip = preset.skip_for((vision.image_size // vision.patch_size) ** 2)
        return {"skip": None if skip is None else skip.to_dict()}

    def preset_skip(self, preset: Preset, config: LlavaSkipConfig) -> SkipConfig | None:
        """The preset's `SkipConfig` for a model that exists.

        Raises:
            UserError: the model is of another size than the presets of this front end.
        """
        return preset.skip_for(config.patches)

    def fits(self, preset: Preset, config: LlavaSkipConfig) -> bool:
        """Whether the preset is for models of this configuration's architecture."""
        return preset.front_end == self.name

    def describe(self, config: LlavaSkipConfig) -> str:
        """The architecture in words, for messages."""
        return f"the front end {self.name!r}"

    # --- figures

    def retained_boxes(self, model: LlavaSkipModel, crops: Tensor) -> tuple[list[Box], str]:
        """What is retained of an image: boxes on its first crop, and the same in words.

        Args:
            model: a skipping model.
            crops: [crops, 3, side, side] of one image.
        """
        assert model.config.skip_config is not None
        return [], f"retained: {model.config.skip_config.retained} tokens"

    def places(self, model: LlavaSkipModel, crops: Tensor) -> list[Place]:
        """Where each of an image's P visual tokens looks, in the order of `encode`: the retained first, none merged.

        Args:
            model: the model.
            crops: [crops, 3, side, side] of one image.

        Raises:
            UserError: the front end does not know it.
        """
        raise UserError(f"front_end {self.name!r} does not say where its visual tokens look.")


_FRONT_ENDS: dict[str, FrontEnd] = {}


def register_front_end(front_end: FrontEnd) -> None:
    """Make a front end known by its name, before a configuration names it.

    Raises:
        UserError: another one has the name.
    """
    if front_end.name in _FRONT_ENDS:
        raise UserError(f"There is a front end {front_end.name!r} already: choose another name.")
    _FRONT_ENDS[front_end.name] = front_end


def get_front_end(name: str) -> FrontEnd:
    """The front end of a name.

    Raises:
        UserError: there is none; the message lists the known names.
    """
    if name not in _FRONT_ENDS:
        raise UserError(f"front_end is {name!r}; known: {', '.join(_FRONT_ENDS)}.")
    return _FRONT_ENDS[name]


def split_box(box: Box, parts: int) -> list[Box]:
    """A box as `parts` equal cells row by row: a square grid if the number is a square, else stripes."""
    across = round(parts**0.5)
    across, down = (across, across) if across * across == parts else (parts, 1)
    left, top, right, bottom = box
    x = [left + (right - left) * n // across for n in range(across + 1)]
    y = [top + (bottom - top) * n // down for n in range(down + 1)]
    return [(x[i], y[j], x[i + 1], y[j + 1]) for j in range(down) for i in range(across)]


def grid_boxes(side: int, cell: int) -> list[Box]:
    """The cells of a grid over an image of side x side pixels, row by row."""
    return [(x, y, x + cell, y + cell) for y in range(0, side, cell) for x in range(0, side, cell)]
