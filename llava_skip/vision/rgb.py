"""Images of every mode -> RGB, as they are meant to be seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from llava_skip_base.images import calling_pillow, open_image, orientation

_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What turns an image upright, by the orientation in its EXIF data."""


def load_rgb(source: str | bytes | Path) -> Image.Image:
    """An image as it is given to a model; arguments and errors as `open_image`."""
    with open_image(source) as opened:
        return to_rgb(opened)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB: turned upright, 16-bit grays scaled, transparent parts on white.

    PIL's conversion would ignore the orientation of photographs, clip 16-bit grays to white, and show the colours that
    are stored under transparent pixels, mostly black.

    Raises:
        ImageError: the image cannot be decoded or converted.
    """
    with calling_pillow():
        image.load()
    turn = _TURN.get(orientation(image))
    with calling_pillow():
        if turn is not None:
            image = image.transpose(turn)
        if is_deep(image):
            gray = np.asarray(image, dtype=np.float64)
            scale = 257.0 if gray.max(initial=0) > 255 else 1.0
            image = Image.fromarray(np.clip(gray / scale, 0, 255).astype(np.uint8))
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        return image.convert("RGB")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after turning the image upright; reads only the header."""
    width, height = image.size
    return (height, width) if orientation(image) >= 5 else (width, height)


def is_turned(image: Image.Image) -> bool:
    """Whether the file says that the image must be turned or mirrored to be upright."""
    return orientation(image) != 1


def is_deep(image: Image.Image) -> bool:
    """Whether its grays have more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")
