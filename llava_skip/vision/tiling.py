"""LLaVA-HD's images: a thumbnail and the tiles of a grid, all of the tower's size (method, section 1 B)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import get_size_dict
from transformers.image_transforms import to_pil_image
from transformers.image_utils import ChannelDimension, make_flat_list_of_images
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.processing_utils import ImagesKwargs

from llava_skip.vision.square import resize_padded
from llava_skip.vision.values import every_byte, look_up
from llava_skip_base.errors import UserError

PADDING_COLOUR = (122, 116, 104)
"""CLIP's mean pixel."""


def choose_grid(width: int, height: int, most: int, side: int) -> tuple[int, int]:
    """Columns and rows of tiles whose shape is nearest to that of the image.

    On an exactly equal distance the larger grid wins if the image has more than half the pixels of its tiles.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        most: the largest number of tiles.
        side: of a tile, in pixels.
    """
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    best, distance = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        new = abs(width / height - columns / rows)
        large = width * height > 0.5 * side * side * columns * rows
        if new < distance or (new == distance and large):
            best, distance = (columns, rows), new
    return best


def cut_tiles(image: Image.Image, most: int, side: int, resample: int = Image.Resampling.BICUBIC) -> list[Image.Image]:
    """The thumbnail, then the tiles row by row; each is stretched to side x side pixels."""
    columns, rows = choose_grid(*image.size, most, side)
    stretched = image.resize((columns * side, rows * side), resample)
    boxes = [(x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(rows) for x in range(columns)]
    thumbnail = image.resize((side, side), resample)
    return [thumbnail, *(stretched.crop(box) for box in boxes)]


class TilingKwargs(ImagesKwargs):
    """Arguments of `TilingImageProcessorPil`."""

    max_tiles: int | None


FIXED = {
    "do_resize": (True,),
    "do_convert_rgb": (True,),
    "pad_size": (None,),
    "image_seq_length": (None,),
    "data_format": (None, ChannelDimension.FIRST),
}
"""Arguments that have one value: every crop is resized to the tower's size, in three colours, channels first."""


class TilingImageProcessorPil(LlavaImageProcessorPil):
    """Images -> `pixel_values` [crops of all images, 3, side, side] and `crop_counts`, the number of crops of each.

    `crop_size` is the tower's size, `max_tiles` the largest grid. With `do_pad` an image is first padded to a square
    of twice the tower's size, as in the paper's training, so that all have the same number of crops. All arguments can
    also be given for one call.
    """

    model_input_names = ["pixel_values", "crop_counts"]
    valid_kwargs = TilingKwargs
    max_tiles = 4

    def __init__(self, max_tiles: int = 4, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs.keys() - {"image_processor_type", "processor_class", "feature_extractor_type"})
        if (side := _side(kwargs)) is not None:
            kwargs |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        super().__init__(max_tiles=max_tiles, **kwargs)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Cut and normalise images (PIL, arrays or tensors, nested lists too).

        Raises:
            UserError: an argument is unknown, or cannot be followed.
        """
        chosen = self._resolve(kwargs)
        cut = [self._cut(image, chosen) for image in make_flat_list_of_images(images)]
        tables = {unit: _value_table(chosen, unit) for _, unit in cut}
        values = [look_up(tables[unit], [np.asarray(crop) for crop in crops]) for crops, unit in cut]
        whole = values[0] if len(values) == 1 else np.concatenate(values)
        data = {"pixel_values": whole, "crop_counts": np.array([len(crops) for crops, _ in cut])}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def value_table(self, **kwargs: Any) -> np.ndarray:
        """[3, 256], for each colour the value of each byte, under the arguments of a call."""
        return _value_table(self._resolve(kwargs), unit=False)

    def count_crops(self, width: int, height: int, **kwargs: Any) -> int:
        """Crops of an image of this size in pixels, under the arguments of a call: the thumbnail and its tiles."""
        side, padded, most = self.crop_size["height"], self.do_pad, self.max_tiles
        if kwargs:  # not for each image of a data set
            side, padded, most = (self._resolve(kwargs)[name] for name in ("side", "do_pad", "max_tiles"))
        width, height = (2 * side, 2 * side) if padded else (width, height)
        columns, rows = choose_grid(width, height, most, side)
        return 1 + columns * rows

    def _refuse_unknown(self, names: Iterable[str]) -> None:
        if unknown := sorted(set(names) - set(self.valid_kwargs.__annotations__)):
            raise UserError(f"{type(self).__name__} does not take {', '.join(unknown)}: leave it out.")

    def _resolve(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call, with the processor's own where a call gives none."""
        self._refuse_unknown(given)
        known = self.valid_kwargs.__annotations__
        chosen = {n: given[n] if given.get(n) is not None else getattr(self, n, None) for n in known}
        for name in known.keys() & FIXED:
            if chosen[name] not in FIXED[name]:
                raise UserError(f"{name} is {chosen[name]!r}; images that are cut into tiles need {FIXED[name][0]!r}.")
        chosen["side"] = _side(given) or _side({"crop_size": self.crop_size})
        if not isinstance(chosen["max_tiles"], int) or chosen["max_tiles"] < 1:
            raise UserError(f"max_tiles is {chosen['max_tiles']!r}; it must be at least 1.")
        return chosen

    def _cut(self, image: Any, chosen: dict[str, Any]) -> tuple[list[Image.Image], bool]:
        """The crops of an image, and whether its values were between 0 and 1."""
        unit, side = False, chosen["side"]
        if not isinstance(image, Image.Image):
            array = self.process_image(image, do_convert_rgb=True, input_data_format=chosen["input_data_format"])
            unit = array.dtype.kind == "f" and float(array.max(initial=0.0)) <= 1
            image = to_pil_image(array, do_rescale=unit, input_data_format=ChannelDimension.FIRST)
        image = image if image.mode == "RGB" else image.convert("RGB")
        if chosen["do_pad"]:
            image = resize_padded(image, 2 * side, PADDING_COLOUR, Image.Resampling.LANCZOS)
        return cut_tiles(image, chosen["max_tiles"], side, chosen["resample"]), unit


def _side(given: dict[str, Any]) -> int | None:
    """The side in pixels that `crop_size` and `size` give, either of them or both; None if neither is given.

    Raises:
        UserError: they are not one square.
    """
    sizes = {name: given[name] for name in ("crop_size", "size") if given.get(name) is not None}
    sides = {n for name, size in sizes.items() for n in dict(get_size_dict(size, param_name=name)).values()}
    if len(sides) > 1:
        raise UserError(f"The tower's size must be one square; got {sizes}.")
    return sides.pop() if sides else None


def _value_table(chosen: dict[str, Any], unit: bool) -> np.ndarray:
    """[3, 256], for each colour the value of each byte, rescaled and normalised as asked for.

    Args:
        chosen: the arguments of a call.
        unit: whether a byte stands for a value between 0 and 1.
    """
    values: Any = every_byte()[:, 0]
    if unit or chosen["do_rescale"] or chosen["do_normalize"]:
        values = values.astype(np.float32)
    if unit:
        values = values / 255
    if chosen["do_rescale"]:
        values = values / np.float32(1 / chosen["rescale_factor"])  # 255 in the last digit, as 1 / 255 is not
    if chosen["do_normalize"]:
        mean, std = (np.array(chosen[name], np.float32).reshape(-1, 1) for name in ("image_mean", "image_std"))
        values = (values - mean) / std
    return values
