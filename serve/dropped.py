"""Finds the images in a typed line: paths as terminals paste them when a file is dropped on the window.

They put a path in quotes, write a backslash before spaces, or paste `file://` with `%20`; a typed path may be any of
these. A word is an image if it ends as one; what else stands in the line is the question.
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

_WORD = re.compile(r"""'([^']+)'|"([^"]+)"|((?:\\.|[^\s\\])+?)(?=[?.,;:!]*(?:\s|$))""")
"""In quotes, or up to the next space that has no backslash; the end of a sentence is no part of it."""
_CLEAR = ("/", "~", "./", "../", "file:")
"""How a word begins that can only be meant as a path."""


def take_images(line: str) -> tuple[list[Path], str]:
    """The images that a line names, and the line without them.

    Args:
        line: as it was typed or pasted.

    Raises:
        UserError: a word that can only be meant as the path of an image names no file.
    """
    whole = typed_path(line)
    if whole.name.lower().endswith(_endings()) and os.path.isfile(whole):
        return [whole], ""  # its spaces need no quotes then
    found: list[Path] = []
    left, place = "", 0
    while place < len(line):
        word = _WORD.match(line, place)
        if word is not None and (path := _image(word)) is not None:
            found.append(path)
            place = word.end()
            continue
        rest = re.compile(r"\S+|\s+").match(line, place)  # a quote may be an apostrophe: only this word is none
        assert rest is not None  # one of the two always fits
        left, place = left + rest[0], rest.end()
    return found, " ".join(left.split()) if found else left.strip()


def typed_path(text: str) -> Path:
    """The path that a whole text names, in any of the forms."""
    text = text.strip()
    word = _WORD.fullmatch(text)
    readings = _readings(word) if word is not None else [text]
    return Path(next((reading for reading in [*readings, os.path.expanduser(text)] if os.path.isfile(reading)), text))


def _image(word: re.Match[str]) -> Path | None:
    """The image that a word names; None if it is no path of one."""
    readings = [reading for reading in _readings(word) if reading.lower().endswith(_endings())]
    for reading in readings:
        if os.path.isfile(reading):
            return Path(reading)
    if readings and (typed := word[1] or word[2] or word[3]).startswith(_CLEAR):
        raise UserError(f"there is no image {shortened(typed, 300)}: check its path.")
    return None


def _readings(word: re.Match[str]) -> list[str]:
    """The paths that a word can mean."""
    typed = word[1] or word[2]
    readings = [typed] if typed else [re.sub(r"\\(.)", r"\1", word[3]), word[3]]
    found = []
    for reading in readings:
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
