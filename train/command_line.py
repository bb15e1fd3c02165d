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

from transformers import HfArgumentParser

from llava_skip_base.errors import UserError
from train.llava_flags import EPILOG, FLAGS, translate
from train.recipe.recipes import recipe_names, recipe_words

RECIPE = "--recipe"
_RECIPE_HELP = "A recipe, whose arguments all others override: a YAML file, or one of {}."


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
    given, words = list(words), with_underscores(words)
    as_given = dict(zip(words, given, strict=True))
    show_help(kinds, words)
    known = [field.name for kind in kinds for field in fields(kind)]
    words = translate(with_recipe(words, known))
    parser = _Parser(kinds, allow_abbrev=False, add_help=False)
    *read, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        known += [flag.name for flag in FLAGS]
        word = unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
        hint = "".join(f" Did you mean --{name}?" for name in get_close_matches(word, known, 1))
        named = " ".join(as_given.get(name, name) for name in unknown)
        raise UserError(f"unknown arguments: {named}.{hint} --help lists the arguments.")
    return tuple(read)


def with_underscores(words: Sequence[str]) -> list[str]:
    """The words with `_` in the names of arguments: `--vision-tower=x` becomes `--vision_tower=x`."""
    named = [word.partition("=") if word.startswith("--") else ("", "", word) for word in words]
    return [name.replace("-", "_").replace("__", "--", 1) + equals + value for name, equals, value in named]


def with_recipe(words: Sequence[str], known: Sequence[str], processes: int | None = None) -> list[str]:
    """The words with `--recipe` replaced by the recipe's arguments, which come first.

    Args:
        words: of the command line.
        known: names of all arguments.
        processes: of the run; None if torchrun has started them.

    Raises:
        UserError: an unknown recipe or key.
    """
    source, own = take_option(words, RECIPE)
    if source is None:
        return own
    plain = {flag.name: getattr(flag, "ours", flag.name) for flag in FLAGS}
    names = [word.partition("=")[0].removeprefix("--") for word in own if word.startswith("--")]
    return [*recipe_words(source, [plain.get(name, name) for name in names], known, processes), *own]


def take_option(words: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """The last value of an option, and the other words.

    Raises:
        UserError: it is given without a value.
    """
    value, others, left = None, [], iter(words)
    for word in left:
        name, equals, text = word.partition("=")
        if name != option:
            others.append(word)
        elif (value := text if equals else next(left, None)) is None:
            raise UserError(f"{option} needs a value. --help lists the arguments.")
    return value, others


def show_help(kinds: Sequence[type], words: Sequence[str]) -> None:
    """Print the project's arguments in groups for `--help`, with those of transformers for `--help-all`, and exit."""
    if not {"-h", "--help", "--help_all"} & set(words):
        return
    everything = "--help_all" in words
    lines = [f"usage: {sys.argv[0]} [{RECIPE} NAME] [arguments]", ""]
    lines += _argument(RECIPE, _RECIPE_HELP.format(", ".join(recipe_names())))
    for kind in kinds:
        groups: dict[str, list[Field[Any]]] = {}
        for entry in fields(kind):
            groups.setdefault(_group(kind, entry), []).append(entry)
        for group, entries in groups.items():
            if group != "inherited" or everything:
                lines += ["", f"{group}:"]
                lines += [line for entry in entries for line in _argument(f"--{entry.name}", _help(entry))]
    more = [] if everything else ["--help-all adds the arguments inherited from transformers' TrainingArguments."]
    print("\n".join([*lines, "", *more, EPILOG]))
    raise SystemExit(0)


def _group(kind: type, entry: Field[Any]) -> str:
    """The group of an argument: named by the dataclass, as a whole or by name."""
    groups = getattr(kind, "GROUPS", None)
    if isinstance(groups, str):
        return groups
    return next((group for group, names in (groups or {}).items() if entry.name in names), "inherited")


def _help(entry: Field[Any]) -> str:
    text = str(entry.metadata.get("help", "")).replace("%%", "%")
    default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
    shown = "" if default in (None, MISSING, "") or "efault" in text else f" (default: {default})"
    return " ".join(text.split()) + shown


def _argument(name: str, text: str) -> list[str]:
    first = f"  {name:30}"
    wrapped = textwrap.wrap(text, 85) or [""]
    return [f"{first} {wrapped[0]}".rstrip(), *(f"{'':32} {line}".rstrip() for line in wrapped[1:])]
