"""Mistakes that a user can correct: the only exceptions that a program prints as one message, with exit code 2.

Everything else that is raised is a fault of the program, and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava_skip_base.texts import shortened


class UserError(ValueError):
    """A wrong option, file or model. The message says what was seen, what was expected and what to change."""


class MissingFileError(FileNotFoundError, UserError):
    """A file or folder that does not exist."""


class MissingPackageError(ImportError, UserError):
    """An optional package that is not installed. The message has the command that installs it."""


def first_few(values: Sequence[Any], limit: int = 5) -> str:
    """The number of `values`, and the first `limit` of them, for an error message."""
    names = ", ".join(shortened(value, 200) for value in values[:limit])
    return f"{len(values)} ({names}{', ...' if len(values) > limit else ''})"
