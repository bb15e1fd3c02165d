"""A command line as dataclasses, for every program of `train`.

Recipes, LLaVA's flag names, and `-` for `_` in names are understood; a mistake is one message.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from llava_skip_base.errors import UserError
from train.arguments import KINDS
from train.llava_flags import EPILOG, FLAGS, plain_name, translate
from train.recipe.recipes import RECIPE, recipe_names, recipe_words, take_option, with_underscores
from train.seeds import SEEDS
from train.training_flags import refuse_unsupported

_RECIPE_HELP = "A recipe, whose arguments all others override: a YAML file, or one of {}."

_SEEDS_HELP = "The run once for each seed, in OUTPUT/seed-N: a number of runs, such as 3, or seeds, such as 42,43,44."


class _Parser(HfArgumentParser):
    """argparse would print every argument, once for each process, and the mistake after them."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. --help lists the arguments.")


def read_command_line(kinds: Sequence[type], words: Sequence[str]) -> tuple[Any, ...]:
    """An instance of each dataclass; `--help` and `--help-all` print and exit.

    Args:
        kinds: dataclasses; their fields are the arguments.
        words: the command line, without the program's name.

    Raises:
        UserError: unknown arguments or values, with what to use instead.
    """
    words = check_names(kinds, words)
    words = translate(with_recipe(words, [entry.name for kind in kinds for entry in fields(kind)]))
    _refuse(kinds, words)  # those of the recipe
    return _parser(kinds).parse_args_into_dataclasses(words)


def check_names(kinds: Sequence[type], words: Sequence[str]) -> list[str]:
    """The words with `_` in names, once all of them are known; no recipe is read.

    Args:
        kinds: as of `read_command_line`.
        words: as of `read_command_line`.

    Raises:
        UserError: an unknown argument, or one that is not supported.
    """
    given, words = list(words), with_underscores(words)
    show_help(kinds, words)
    _refuse(kinds, words)
    _, own = take_option(words, RECIPE)
    _, unknown = _parser(kinds).parse_known_args(translate(own))
    if unknown:
        as_given = dict(zip(words, given, strict=True))
        known = [*_names(kinds), *(flag.name for flag in FLAGS)]
        if unknown[0].partition("=")[0] == SEEDS:
            raise UserError(
                f"{SEEDS} is for llava-skip train, which starts a run for each; to this give --seed and --output_dir."
            )
        word = unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
        hint = "".join(f" Did you mean --{name}?" for name in get_close_matches(word, known, 1))
        named = " ".join(as_given.get(name, name) for name in unknown)
        raise UserError(f"unknown arguments: {named}.{hint} --help lists the arguments.")
    return words


def _names(kinds: Sequence[type]) -> list[str]:
    """The names that the dataclasses have, without those of transformers that are not supported."""
    return [entry.name for kind in kinds for entry in fields(kind) if _group(kind, entry) is not None]


def _refuse(kinds: Sequence[type], words: Sequence[str]) -> None:
    if any(issubclass(kind, TrainingArguments) for kind in kinds):
        refuse_unsupported(words, [*_names(kinds), *(flag.name for flag in FLAGS)])


def _parser(kinds: Sequence[type]) -> _Parser:
    return _Parser(kinds, allow_abbrev=False, add_help=False)


def with_recipe(words: Sequence[str], taken: Sequence[str], processes: int | None = None) -> list[str]:
    """The words with `--recipe` replaced by the recipe's arguments, which come first.

    Args:
        words: of the command line.
        taken: names of the arguments that the program takes; those of a run that it does not take are left out.
        processes: of the run; None if torchrun has started them.

    Raises:
        UserError: an unknown recipe or key.
    """
    source, own = take_option(words, RECIPE)
    if source is None:
        return own
    plain = {flag.name: plain_name(flag) for flag in FLAGS}
    names = [word.partition("=")[0].removeprefix("--") for word in own if word.startswith("--")]
    given = [plain.get(name, name) for name in names]
    known = {entry.name for kind in KINDS for entry in fields(kind)}
    return [*recipe_words(source, [*given, *known.difference(taken)], known.union(taken), processes), *own]


def show_help(kinds: Sequence[type], words: Sequence[str]) -> None:
    """Print the project's arguments in groups for `--help`, with those of transformers for `--help-all`, and exit."""
    if not {"-h", "--help", "--help_all"} & set(words):
        return
    everything = "--help_all" in words
    lines = [f"usage: {sys.argv[0]} [{RECIPE} NAME] [arguments]", ""]
    lines += _argument(RECIPE, _RECIPE_HELP.format(", ".join(recipe_names())))
    if any(issubclass(kind, TrainingArguments) for kind in kinds):
        lines += _argument(SEEDS, _SEEDS_HELP)
    for kind in kinds:
        groups: dict[str, list[Field[Any]]] = {}
        for entry in fields(kind):
            if (group := _group(kind, entry)) is not None:
                groups.setdefault(group, []).append(entry)
        for group, entries in groups.items():
            if group != "inherited" or everything:
                lines += ["", f"{group}:"]
                lines += [line for entry in entries for line in _argument(f"--{entry.name}", _help(entry))]
    more = [] if everything else ["--help-all adds those of transformers' TrainingArguments that a run takes."]
    print("\n".join([*lines, "", *more, EPILOG]))
    raise SystemExit(0)


def _group(kind: type, entry: Field[Any]) -> str | None:
    """The group of an argument: named by the dataclass, as a whole or by name; None if a run does not take it."""
    if not entry.init:  # no argument: something else sets it
        return None
    groups = getattr(kind, "GROUPS", "of this program")
    if isinstance(groups, str):
        return groups
    return next((group for group, names in groups.items() if entry.name in names), None)


def _help(entry: Field[Any]) -> str:
    text = str(entry.metadata.get("help", "")).replace("%%", "%")
    default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
    shown = "" if default in (None, MISSING, "") or "efault" in text else f" (default: {default})"
    return " ".join(text.split()) + shown


def _argument(name: str, text: str) -> list[str]:
    first = f"  {name:30}"
    wrapped = textwrap.wrap(text, 85) or [""]
    return [f"{first} {wrapped[0]}".rstrip(), *(f"{'':32} {line}".rstrip() for line in wrapped[1:])]
