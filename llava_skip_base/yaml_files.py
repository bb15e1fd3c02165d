"""The one reader of YAML files, which may come from anybody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from llava_skip_base.errors import UserError, shortened
from llava_skip_base.files import read_text

MOST_VALUES = 100_000
"""Values of a file, those counted again that it repeats by a name: nine names can stand for millions of values."""


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is not YAML, or holds what no value can be made of: a month 99, endless nesting, endless repeats.
    """
    text = read_text(path)
    try:
        value = yaml.safe_load(text)
    except RecursionError:
        raise UserError(f"{path} is not valid YAML (nested too deep); correct it.") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError comes from dates and numbers
        reason = shortened(" ".join(str(error).split()), 300)
        raise UserError(f"{path} is not valid YAML ({reason}); correct it.") from error
    if _is_endless(value):
        raise UserError(f"{path} holds more than {MOST_VALUES:,} values, or itself: leave out its repeats (*name).")
    return value


def _is_endless(value: Any) -> bool:
    waiting, count = [value], 0
    while waiting and count <= MOST_VALUES:
        whole = waiting.pop()
        parts = [*whole, *whole.values()] if isinstance(whole, dict) else whole if isinstance(whole, list) else []
        count += len(parts)
        waiting += [part for part in parts if isinstance(part, dict | list)]
    return count > MOST_VALUES
