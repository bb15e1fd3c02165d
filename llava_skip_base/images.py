"""The one way to open an image, wherever it comes from: named formats only, and what a decoder raises is its fault."""

from __future__ import annotations

import base64
import binascii
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import unquote_to_bytes

from PIL import ExifTags, Image, UnidentifiedImageError

from llava_skip_base.errors import UserError, shortened
from llava_skip_base.files import is_pointer

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Formats that are tried, in Pillow's names; a JPEG may hold several (MPO). Others run programs (EPS), or are rare."""
MOST_PIXELS = 2 * 89_478_485
"""Pixels of the largest image that is made on the way to a model; Pillow opens no larger ones by itself."""
_DECODERS_RAISE = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, MemoryError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise about broken files; NotImplementedError is a RuntimeError."""
_SCHEME = "data:"


class ImageError(UserError):
    """An image that cannot be read. Its cause is what Pillow raised."""


@contextmanager
def calling_pillow() -> Iterator[None]:
    """Around calls of Pillow alone: what it raises is a fault of the image.

    Raises:
        ImageError: instead.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # train.validate_data reports it
            yield
    except UnidentifiedImageError as error:
        raise ImageError(f"cannot identify image file (tried: {', '.join(_formats())})") from error
    except _DECODERS_RAISE as error:
        reason = shortened(" ".join(str(error).split()), 200) or type(error).__name__
        raise ImageError(reason) from error


def open_image(source: str | bytes | Path) -> Image.Image:
    """An image whose header has been read.

    Args:
        source: the path of a file, a data URI, or the file's bytes.

    Raises:
        ImageError: no such file, not an image, or more pixels than Pillow accepts.
    """
    if isinstance(source, str) and is_data_uri(source):
        source = data_uri_bytes(source)
    file, formats = io.BytesIO(source) if isinstance(source, bytes) else source, _formats()
    try:
        with calling_pillow():
            return Image.open(file, formats=formats)
    except ImageError:
        if not isinstance(source, bytes) and (path := Path(source)).is_file() and is_pointer(path):
            raise ImageError("a git-lfs pointer, not the image itself: run git lfs pull in its folder") from None
        raise


@cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def work_pixels(width: int, height: int, side: int | None) -> float:
    """Pixels of the largest image that is made of one of this size.

    Args:
        width: of the image.
        height: of the image.
        side: what the shorter side is scaled to; None: the image is padded to a square.
    """
    shorter, longer = sorted((max(width, 1), max(height, 1)))
    return float(longer * longer) if side is None else side * side * longer / shorter


def is_data_uri(text: str) -> bool:
    """Whether a text is a file in the form `data:image/png;base64,...`."""
    return text[: len(_SCHEME)].lower() == _SCHEME


def data_uri_bytes(text: str) -> bytes:
    """The file that a data URI holds.

    Raises:
        ImageError: it is not base64.
    """
    head, comma, body = text.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError(f"{shortened(text, 40)} must have the form data:image/png;base64,...")
    return base64_bytes(body)


def base64_bytes(text: str) -> bytes:
    """The bytes of a base64 text; white space and escapes of addresses do no harm.

    Raises:
        ImageError: it is not base64.
    """
    try:
        content = unquote_to_bytes(text) if "%" in text else text.encode("ascii")
        return base64.b64decode(b"".join(content.split()), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ImageError(f"{shortened(text, 40)} is not base64 ({type(error).__name__})") from error


def image_name(source: object) -> str:
    """An image's name for messages; of one without a file, the beginning of its data URI."""
    if isinstance(source, dict):
        source = source.get("path") or "of the table"
    text = str(source)
    return shortened(text, 40 if is_data_uri(text) else 200)


def orientation(image: Image.Image) -> int:
    """How the file says that the image must be turned, 1 (not at all) to 8; nothing else of its EXIF data is used."""
    try:
        with calling_pillow():
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except ImageError:  # data about the photograph may be broken, and the image still whole
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1
