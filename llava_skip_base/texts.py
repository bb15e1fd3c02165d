"""Texts from files of others, as people see them."""

from __future__ import annotations

import re
from typing import Any

_OBEYED = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
"""Control characters but tab and newline, those that turn the direction of text, and halves of characters."""


def plain(value: Any) -> str:
    """A value as text that a terminal only shows: an escape is shown as its code."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", str(value))


def shortened(value: Any, limit: int = 80) -> str:
    """A value as text for a message, cut to `limit` characters."""
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def one_line(error: BaseException, lines: int | None = None) -> str:
    """The first `lines` of an error's message, as one."""
    return " ".join(" ".join(str(error).strip().splitlines()[:lines]).split())
