"""LLaVA-HD's images: a thumbnail and the tiles of a grid, all of the tower's size (method, section 1 B)."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_utils import make_flat_list_of_images, to_numpy_array
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

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


def pad_to_square(image: Image.Image) -> Image.Image:
    """The image in the middle of a square of CLIP's mean colour."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), PADDING_COLOUR)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def cut_tiles(image: Image.Image, most: int, side: int) -> list[Image.Image]:
    """The thumbnail, then the tiles row by row; each is stretched to side x side pixels, bicubic."""
    columns, rows = choose_grid(*image.size, most, side)
    stretched = image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    boxes = [(x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(rows) for x in range(columns)]
    thumbnail = image.resize((side, side), Image.Resampling.BICUBIC)
    return [thumbnail, *(stretched.crop(box) for box in boxes)]


class TilingImageProcessorPil(LlavaImageProcessorPil):
    """Images -> `pixel_values` [crops of all images, 3, side, side] and `crop_counts`, the number of crops of each.

    `crop_size` is the tower's size, `max_tiles` the largest grid. With `do_pad` an image is first padded to a square
    of twice the tower's size, as in the paper's training, so that all have the same number of crops.
    """

    model_input_names = ["pixel_values", "crop_counts"]

    def __init__(self, max_tiles: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_tiles = max_tiles

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Cut and normalise images (PIL or arrays, nested lists too)."""
        side = self.crop_size["height"]
        flat = [self._to_rgb(image) for image in make_flat_list_of_images(images)]
        if self.do_pad:
            double = (2 * side, 2 * side)
            flat = [pad_to_square(image).resize(double, Image.Resampling.LANCZOS) for image in flat]
        crops = [cut_tiles(image, self.max_tiles, side) for image in flat]
        values = np.stack([self._normalised(crop) for cut in crops for crop in cut])
        data = {"pixel_values": values, "crop_counts": np.array([len(cut) for cut in crops])}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def count_crops(self, width: int, height: int) -> int:
        """Crops of an image of this size in pixels: the thumbnail and its tiles."""
        side = self.crop_size["height"]
        width, height = (2 * side, 2 * side) if self.do_pad else (width, height)
        columns, rows = choose_grid(width, height, self.max_tiles, side)
        return 1 + columns * rows

    def _to_rgb(self, image: Any) -> Image.Image:
        image = image if isinstance(image, Image.Image) else Image.fromarray(to_numpy_array(image))
        return image.convert("RGB")

    def _normalised(self, crop: Image.Image) -> np.ndarray:
        mean, std = (np.array(values, dtype=np.float32) for values in (self.image_mean, self.image_std))
        return ((np.asarray(crop, dtype=np.float32) / 255 - mean) / std).transpose(2, 0, 1)
