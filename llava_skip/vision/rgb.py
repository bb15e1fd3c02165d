"""Pictures of every kind -> RGB, as they are meant to be seen."""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image, ImageOps


def to_rgb(picture: Image.Image) -> Image.Image:
    """The picture as RGB: turned upright, 16-bit greys scaled, transparent parts on white.

    Plain conversion would leave photographs lying on their side, clip 16-bit greys to white, and show what colour
    happens to be stored under transparent pixels, mostly black.
    """
    if is_turned(picture):
        picture = ImageOps.exif_transpose(picture)
    if is_deep(picture):
        grey = np.asarray(picture, dtype=np.float64)
        scale = 257.0 if grey.max(initial=0) > 255 else 1.0
        picture = Image.fromarray(np.clip(grey / scale, 0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height once the picture is turned upright; reads the header alone."""
    width, height = picture.size
    return (height, width) if picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8) else (width, height)


def is_turned(picture: Image.Image) -> bool:
    """Whether the file says that the picture must be turned or mirrored to be seen upright."""
    return picture.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)


def is_deep(picture: Image.Image) -> bool:
    """Whether its greys have more than 8 bits."""
    return picture.mode in ("I", "F") or picture.mode.startswith("I;16")
