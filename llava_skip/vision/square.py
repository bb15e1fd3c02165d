"""LLaVA's images: padded to a square or cropped to one, of the tower's size; the values are those of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_transforms import center_crop
from transformers.image_utils import ChannelDimension
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_skip.vision.values import every_byte, look_up

_SWITCHES = ("do_rescale", "do_normalize")
"""Arguments of a call that the quick way follows."""


class SquareImageProcessorPil(LlavaImageProcessorPil):
    """`LlavaImageProcessorPil` in about half of the time for RGB images of Pillow; it is saved under that name.

    Transformers makes an array of the image, pads that, makes an image of it again to resize it, and rescales in
    float64. Here the image stays one of Pillow until it is small, and each byte's value is looked up. What is given in
    another form, or with other arguments, goes transformers' way.
    """

    @classmethod
    def like(cls, images: Any) -> Any:
        """The same image processor in this class, if it is transformers' own; any other one as it is."""
        if type(images) is not LlavaImageProcessorPil:
            return images
        made = cls()
        made.__dict__.update(images.__dict__)
        return made

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """As transformers' LLaVA: `pixel_values` [N, 3, side, side], a list of them without `return_tensors`."""
        flat, tensors = _flat(images), kwargs.get("return_tensors")
        switches = {name: value for name, value in kwargs.items() if name != "return_tensors"}
        known = switches.keys() <= set(_SWITCHES) and all(isinstance(value, bool) for value in switches.values())
        sides = self._sides()
        if args or not known or sides is None or not flat or not all(map(_is_plain, flat)):
            return super().preprocess(images, *args, **kwargs)
        table = self.value_table(**switches)
        values = look_up(table, [self._cut(image, *sides) for image in flat])
        return BatchFeature(data={"pixel_values": list(values) if tensors is None else values}, tensor_type=tensors)

    def value_table(self, **switches: bool) -> np.ndarray:
        """[3, 256], for each colour the value of each byte; bytes if neither rescaled nor normalised.

        Args:
            **switches: `do_rescale` and `do_normalize` of a call, where they are not the processor's own.
        """
        rescales, normalises = (switches.get(name, getattr(self, name)) for name in _SWITCHES)
        values = every_byte()
        if rescales:
            values = self.rescale(values, self.rescale_factor)
        if normalises:
            values = self.normalize(values, self.image_mean, self.image_std)
        return np.ascontiguousarray(values[:, 0])

    def to_dict(self) -> dict[str, Any]:
        """As transformers' LLaVA, which a saved processor names."""
        return super().to_dict() | {"image_processor_type": LlavaImageProcessorPil.__name__.removesuffix("Pil")}

    def _sides(self) -> tuple[int, tuple[int, int]] | None:
        """Pixels of the shorter side, height and width of the crop; None where the settings are not those of LLaVA."""
        size, crop = ({k: v for k, v in dict(given or {}).items() if v} for given in (self.size, self.crop_size))
        resizes = self.do_resize and self.do_center_crop and self.do_convert_rgb and isinstance(self.resample, int)
        colours = all(isinstance(own, list | tuple) and len(own) == 3 for own in (self.image_mean, self.image_std))
        others = getattr(self, "pad_size", None) or getattr(self, "data_format", None)
        is_square = size.keys() == {"shortest_edge"} and crop.keys() == {"height", "width"}
        if others or not (resizes and colours and is_square):
            return None
        return size["shortest_edge"], (crop["height"], crop["width"])

    def _cut(self, image: Image.Image, side: int, crop: tuple[int, int]) -> np.ndarray:
        """The bytes [height, width, 3] of an image as the tower takes it."""
        if self.do_pad:
            colour = tuple(int(mean * 255) for mean in self.image_mean)
            pixels = np.asarray(resize_padded(image, side, colour, self.resample))
        else:
            shorter, longer = sorted(image.size)
            sides = {shorter: side, longer: int(side * longer / shorter)} | {shorter: side}
            pixels = np.asarray(image.resize((sides[image.width], sides[image.height]), self.resample))
        if pixels.shape[:2] == crop:
            return pixels
        return center_crop(pixels, crop, input_data_format=ChannelDimension.LAST)


def resize_padded(image: Image.Image, side: int, colour: tuple[int, ...], resample: int) -> Image.Image:
    """An RGB image, padded to a square and resized to side x side pixels.

    Args:
        image: of any shape; it is in the middle of the square.
        side: in pixels.
        colour: of the padding.
        resample: one of Pillow's filters.
    """
    (width, height), longer = image.size, max(image.size)
    across = longer
    if width > height and resample != Image.Resampling.NEAREST:
        # Pillow filters along rows first, and rounds before it filters along columns: a row of padding stays one
        # colour, so the rows of a wide image are filtered before there is any.
        image, width, across = image.resize((side, height), resample), side, side
    if (width, height) != (across, longer):
        square = Image.new("RGB", (across, longer), colour)
        square.paste(image, ((across - width) // 2, (longer - height) // 2))
        image = square
    return image.resize((side, side), resample)


def _flat(images: Any) -> list[Any]:
    """Images in one list, from an image or from lists of them."""
    if not isinstance(images, list | tuple):
        return [images]
    return [image for part in images for image in _flat(part)]


def _is_plain(image: Any) -> bool:
    """Whether it is an image of Pillow in three colours, nothing transparent."""
    return isinstance(image, Image.Image) and image.mode == "RGB" and image.info.get("transparency") is None
