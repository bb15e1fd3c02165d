"""Recipes: the arguments of a known run as YAML, which flags override.

A recipe has arguments by their names, and three keys of its own: `base` names a recipe that it starts from,
`samples_per_step` is the number of samples of a step on all processes, and `{embedded}` and `{checkpoints}` in a text
stand for the folders of the embedded data set and of the runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from llava_skip_base.errors import UserError
from llava_skip_base.files import read_text
from llava_skip_base.paths import checkpoints, embedded_data, shown

FOLDER = Path(__file__).parents[1] / "recipes"
_BATCH, _ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"


def recipe_names() -> list[str]:
    """The recipes that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def zero_file(name: str) -> str:
    """The DeepSpeed configuration of a name such as `zero2`; a path stays as it is."""
    path = FOLDER / f"{name}.json"
    return str(path) if name.isidentifier() and path.is_file() else name


def recipe_words(source: str, given: Iterable[str], known: Iterable[str], processes: int | None = None) -> list[str]:
    """A recipe as command line words, without what is overridden.

    Args:
        source: a name or a YAML file.
        given: names of the arguments on the command line.
        known: names of all arguments.
        processes: of the run; None reads torchrun's WORLD_SIZE.

    Raises:
        UserError: there is no such recipe, or it has an unknown key.
    """
    recipe = read_recipe(source)
    known, given = set(known), set(given)
    for key in recipe:
        if key not in known | {"samples_per_step"}:
            hint = "".join(f" Did you mean {name}?" for name in get_close_matches(key, known, 1))
            raise UserError(f"The recipe {source} has the unknown key {key!r}.{hint}")
    if "data" in given:
        given.add("images")  # the folder belongs to the recipe's data
    recipe = {key: value for key, value in recipe.items() if key not in given}
    samples = recipe.pop("samples_per_step", None)
    if samples and not given & {_BATCH, _ACCUMULATION}:
        recipe |= _batch(samples, recipe.get(_BATCH), processes or int(os.environ.get("WORLD_SIZE", "1")))
    return [word for key, value in recipe.items() for word in (f"--{key}", *_as_words(value))]


def read_recipe(source: str) -> dict[str, Any]:
    """A recipe with those that it is based on.

    Raises:
        UserError: there is no such recipe, or its file is no mapping.
    """
    named = FOLDER / f"{source}.yaml"
    path = named if named.is_file() else Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"There is no recipe {source!r}: give a YAML file, or one of {', '.join(recipe_names())}.")
    try:
        recipe = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path} holds no recipe: it must map arguments to values.")
    base = recipe.pop("base", None)
    if base == source:
        raise UserError(f"The recipe {source} is based on itself.")
    return (read_recipe(base) if base else {}) | recipe


def _batch(samples: int, largest: int | None, processes: int) -> dict[str, int]:
    """Samples of a process, at most `largest`, and accumulated batches that make `samples` a step."""
    share = max(1, samples // processes)
    batch = min(share, largest or share)
    accumulated = share // batch
    return {_BATCH: batch} | ({_ACCUMULATION: accumulated} if accumulated > 1 else {})


def _as_words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [_as_word(entry) for entry in value]
    return [_as_word(value)]


def _as_word(value: Any) -> str:
    if isinstance(value, (dict, bool)) or value is None:
        return json.dumps(value)
    if not isinstance(value, str):
        return str(value)
    if "{embedded}" in value:
        from playground.data.build import ensure_built

        ensure_built()
    return value.replace("{embedded}", shown(embedded_data())).replace("{checkpoints}", shown(checkpoints()))
