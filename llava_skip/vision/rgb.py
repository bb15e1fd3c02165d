"""Images of every mode -> RGB, as they are meant to be seen."""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image, ImageOps


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB: turned upright, 16-bit grays scaled, transparent parts on white.

    PIL's conversion would ignore the orientation of photographs, clip 16-bit grays to white, and show the colours that
    are stored under transparent pixels, mostly black.
    """
    if is_turned(image):
        image = ImageOps.exif_transpose(image)
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
    return (height, width) if image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8) else (width, height)


def is_turned(image: Image.Image) -> bool:
    """Whether the file says that the image must be turned or mirrored to be upright."""
    return image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)


def is_deep(image: Image.Image) -> bool:
    """Whether its grays have more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")
