"""Texts and tables of others in Markdown: nothing in them is markup."""

import re
from collections.abc import Sequence

from llava_skip_base.texts import plain


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its header the first of `rows`."""
    lines = ["| " + " | ".join(map(markdown_text, row)) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def markdown_text(text: str) -> str:
    """A text in which nothing is markup, in one line."""
    return re.sub(r"([\\`*_\[\]<>&|~$#!])", r"\\\1", " ".join(plain(text).split()))
