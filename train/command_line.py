"""A command line as dataclasses, for every program of `train`: LLaVA's flag names are understood, mistakes are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, NoReturn

from transformers import HfArgumentParser

from llava_skip.errors import UserError
from train.llava_flags import EPILOG, FLAGS, translate


class _Parser(HfArgumentParser):
    """argparse would print every argument, once for each process, and the mistake below them."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. --help lists all arguments.")


def read_command_line(kinds: Sequence[type], words: Sequence[str]) -> tuple[Any, ...]:
    """An instance of each dataclass.

    Args:
        kinds: dataclasses; their fields are the arguments.
        words: the command line, without the program's name.

    Raises:
        UserError: unknown arguments or values, with what to use in their place.
    """
    parser = _Parser(kinds, allow_abbrev=False, epilog=EPILOG)
    *read, unknown = parser.parse_args_into_dataclasses(translate(list(words)), return_remaining_strings=True)
    if unknown:
        known = [field.name for kind in kinds for field in fields(kind)] + [flag.name for flag in FLAGS]
        word = unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
        hint = "".join(f" Did you mean --{name}?" for name in get_close_matches(word, known, 1))
        raise UserError(f"unknown arguments: {' '.join(unknown)}.{hint} --help lists all arguments.")
    return tuple(read)
