"""Recipes: the arguments of a known run as YAML, which flags override.

A recipe has arguments by their names, and three keys of its own: `base` names a recipe that it starts from,
`samples_per_step` is the number of samples of a step on all processes, and `paper` has the row of the paper's tables
that the recipe is for, which no run reads (`paper_row`). In a text `{embedded}`, `{smollm2}` and
`{checkpoints}` stand for the folders of the embedded data set, of the real small language model and of the runs; the
first two are written when they are not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llava_skip_base.errors import UserError
from llava_skip_base.paths import checkpoints, embedded_data, shown
from llava_skip_base.yaml_files import read_yaml

RECIPE = "--recipe"
PAPER = "paper"
FOLDER = Path(__file__).parents[1] / "recipes"
_BATCH, _ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
_PACKED = "max_tokens_per_batch"


def with_underscores(words: Sequence[str]) -> list[str]:
    """The words with `_` in the names of arguments: `--vision-tower=x` becomes `--vision_tower=x`."""
    named = [word.partition("=") if word.startswith("--") else ("", "", word) for word in words]
    return [name.replace("-", "_").replace("__", "--", 1) + equals + value for name, equals, value in named]


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


def recipe_names() -> list[str]:
    """The recipes that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def zero_file(name: str) -> str:
    """The DeepSpeed configuration of a name such as `zero2`; a path stays as it is."""
    path = FOLDER / f"{name}.json"
    return str(path) if name.isidentifier() and path.is_file() else name


def checkpointing_of(value: str | bool) -> bool | None:
    """The value of --activation_checkpointing: true, false, or None for "auto".

    Raises:
        UserError: it is something else.
    """
    known = {"true": True, "false": False, "auto": None}
    if (word := str(value).lower()) not in known:
        raise UserError(f"--activation_checkpointing is {value!r}; it must be true, false or auto.")
    return known[word]


def set_checkpointing(run: Any) -> None:
    """Give a run's `activation_checkpointing` the values that transformers has, and "auto" for what is decided later.

    Raises:
        UserError: another value.
    """
    if run.activation_checkpointing is not None:
        on = checkpointing_of(run.activation_checkpointing)
        run.activation_checkpointing = "auto" if on is None else on


def recipe_words(
    source: str, given: Iterable[str], known: Iterable[str] | None = None, processes: int | None = None
) -> list[str]:
    """A recipe as command line words, without what is overridden.

    Args:
        source: a name or a YAML file.
        given: names of the arguments on the command line.
        known: names of all arguments; None leaves their check to the run.
        processes: of the run; None reads torchrun's WORLD_SIZE.

    Raises:
        UserError: there is no such recipe, or it has an unknown key.
    """
    recipe = read_recipe(source)
    given = set(given)
    names = {*(recipe if known is None else known), "samples_per_step"}
    if unknown := [key for key in recipe if key not in names]:
        hint = "".join(f" Did you mean {name}?" for name in get_close_matches(unknown[0], names, 1))
        raise UserError(f"The recipe {source} has the unknown key {unknown[0]!r}.{hint}")
    if "data" in given:
        given.add("images")  # the folder belongs to the recipe's data
    recipe = {key: value for key, value in recipe.items() if key not in given}
    samples = recipe.pop("samples_per_step", None)
    if samples is not None and (not isinstance(samples, int) or samples < 1):
        raise UserError(f"The recipe {source} has samples_per_step {samples!r}; it must be a number above 0.")
    is_packed = _PACKED in given or recipe.get(_PACKED) is not None  # tokens then say how large a step is
    if samples and not is_packed and not given & {_BATCH, _ACCUMULATION}:
        recipe |= _batch(samples, recipe.get(_BATCH), processes or int(os.environ.get("WORLD_SIZE", "1")))
    return [word for key, value in recipe.items() for word in (f"--{key}", *_as_words(value))]


def read_recipe(source: str, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe with those that it is based on; `above` are the files that are based on it.

    Raises:
        UserError: there is no such recipe, or its file is no mapping.
    """
    named = FOLDER / f"{source}.yaml"
    path = named if named.is_file() else Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"There is no recipe {source!r}: give a YAML file, or one of {', '.join(recipe_names())}.")
    if path.resolve() in above:
        raise UserError(f"The recipe {source} is based on itself.")
    recipe = read_yaml(path)
    if not isinstance(recipe, dict):
        raise UserError(f"{path} holds no recipe: it must map arguments to values.")
    base = recipe.pop("base", None)
    recipe.pop(PAPER, None)
    return (read_recipe(base, (*above, path.resolve())) if base else {}) | recipe


def paper_row(name: str) -> dict[str, Any] | None:
    """The row of the paper's tables that a recipe of the project is for: table, row, scores, hours; None: of none."""
    return read_yaml(FOLDER / f"{name}.yaml").get(PAPER)


def _batch(samples: int, largest: int | None, processes: int) -> dict[str, int]:
    """Samples of a process, at most `largest`, and accumulated batches that make about `samples` a step, never more."""
    share = max(1, samples // processes)
    accumulated = -(-share // (largest or share))
    return {_BATCH: share // accumulated} | ({_ACCUMULATION: accumulated} if accumulated > 1 else {})


def _as_words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [_as_word(entry) for entry in value]
    return [_as_word(value)]


def _as_word(value: Any) -> str:
    if isinstance(value, (dict, bool)) or value is None:
        return json.dumps(value)
    return with_folders(value) if isinstance(value, str) else str(value)


def with_folders(text: str) -> str:
    """A text of a recipe with the folders that its names stand for; they are written when they are not there."""
    for name, folder in _FOLDERS.items():
        if name in text:
            text = text.replace(name, shown(folder()))
    return text


def _embedded() -> Path:
    from playground.data.build import ensure_built

    ensure_built()
    return embedded_data()


def _smollm2() -> Path:
    from playground.smollm2 import ensure_smollm2

    return ensure_smollm2()


_FOLDERS: dict[str, Callable[[], Path]] = {
    "{embedded}": _embedded,
    "{smollm2}": _smollm2,
    "{checkpoints}": checkpoints,
}
"""What names in a recipe stand for."""
