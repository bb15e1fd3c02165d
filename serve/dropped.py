"""Finds the images in a typed line: paths as terminals paste them when a file is dropped on the window.

They put a path in quotes, write a backslash before spaces, or paste `file://` with `%20`; a typed path may be any of
these, with a sentence's marks around it. What else stands in the line is the question. A word that is written as a path
or as an image's name, and names no image, is refused: the model would answer without the image.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import Image

from llava_skip_base.errors import UserError
from llava_skip_base.images import FORMATS
from llava_skip_base.texts import shortened

_QUOTED = re.compile(r"""'([^']+)'|"([^"]+)\"""")
_WORD = re.compile(r"\s+|(?:\\.|[^\s\\]|\\$)+|\\", re.DOTALL)
"""Up to the next space that has no backslash."""
_BEFORE, _AFTER = "([{<'\"", ")]}>'\"?.,;:!"
"""Marks of a sentence around a word."""
_PATH = re.compile(r"(~|\.{1,2})/.|/[^/]+/.|file:/")
"""How a word begins that can only be meant as a path."""
_OTHERS = (".heic", ".heif", ".svg", ".psd", ".jxl", ".dng", ".nef", ".cr2", ".arw")
"""Endings of images that are not read."""


def take_images(line: str) -> tuple[list[Path], str]:
    """The images that a line names, and the line without them.

    Args:
        line: as it was typed or pasted.

    Raises:
        UserError: a word is written as a path or as an image's name, and names no image.
    """
    if (whole := _image(_readings(line.strip()))) is not None:
        return [whole], ""  # its spaces need no quotes then
    found: list[Path] = []
    left: list[str] = []
    place = 0
    while place < len(line):
        piece, path, rest = _next(line, place)
        found += [] if path is None else [path]
        left.append(rest)
        place += len(piece)
    question = "".join(left)
    return found, " ".join(question.split()) if found else question.strip()


def typed_path(text: str) -> Path:
    """The path that a whole text names, in any of the forms; a file need not be there."""
    text = text.strip()
    quoted = _QUOTED.fullmatch(text)
    readings = [*(_readings(quoted[1] or quoted[2], quoted=True) if quoted else _readings(text)), text]
    return Path(next(filter(os.path.isfile, readings), readings[0]))


def _next(line: str, place: int) -> tuple[str, Path | None, str]:
    """The piece of a line that begins at a place, the image that it names, and what it has beside the image's name."""
    if (quoted := _QUOTED.match(line, place)) is not None:
        text = quoted[1] or quoted[2]
        if (image := _image(_readings(text, quoted=True))) is not None:
            return quoted[0], image, ""
        if _PATH.match(text) or not re.search(r"\s", text):  # one with spaces may be two apostrophes of a sentence
            _refuse_path(text, _readings(text, quoted=True))
    word = _WORD.match(line, place)
    assert word is not None  # one of its forms always fits
    bare = word[0].lstrip(_BEFORE).rstrip(_AFTER)
    for name in (word[0], bare, bare.removesuffix("'s")):
        if (image := _image(_readings(name))) is not None:
            before, _, after = word[0].partition(name)
            return word[0], image, before + after
    _refuse_path(bare, _readings(bare))
    return word[0], None, word[0]


def _image(readings: list[str]) -> Path | None:
    """The first image among the paths that a text can mean."""
    names = (reading for reading in readings if reading.lower().endswith(_endings()))
    return next((Path(name) for name in names if os.path.isfile(name)), None)


def _refuse_path(text: str, readings: list[str]) -> None:
    """Raise UserError if a text that names no image is written as the path of one."""
    ending, shown = os.path.splitext(text.lower())[1], shortened(text, 300)
    if ending in _OTHERS:
        raise UserError(f"{shown}: images of the type {ending} are not read; convert it to PNG or JPEG.")
    if ending not in _endings() and (ending or not _PATH.match(text)):
        return
    if any(map(os.path.isdir, readings)):
        raise UserError(f"{shown} is a folder: give the path of an image.")
    if any(map(os.path.isfile, readings)):
        raise UserError(f"{shown} has no ending of an image: attach it with /image.")
    raise UserError(f"there is no image {shown}: check its path.")


def _readings(text: str, quoted: bool = False) -> list[str]:
    """The paths that a text can mean; outside of quotes a backslash may belong to the character after it."""
    found = []
    for reading in [text] if quoted else dict.fromkeys([re.sub(r"\\(.)", r"\1", text), text]):
        if reading.startswith("file:"):
            parts = _split_address(reading)
            reading = url2pathname(parts) if parts else ""
        found.append(os.path.expanduser(reading))
    return [reading for reading in found if reading and "\0" not in reading]


def _split_address(address: str) -> str | None:
    """The path in a `file:` address of this machine."""
    try:
        parts = urlsplit(address)
    except ValueError:  # an unclosed bracket
        return None
    return parts.path if parts.netloc in ("", "localhost") else None


@cache
def _endings() -> tuple[str, ...]:
    return tuple(ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS)
