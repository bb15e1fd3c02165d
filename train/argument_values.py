"""Values of a run's arguments: numbers in their ranges, and those that are JSON."""

from __future__ import annotations

import json
import math
from typing import Any

from llava_skip_base.errors import UserError
from train.recipe.parts import PART_PREFIXES


def check_numbers(arguments: Any, above_zero: tuple[str, ...], not_negative: tuple[str, ...]) -> None:
    """Refuse numbers with which a run would fail late, or do nothing and look finished."""
    for name in (*above_zero, *not_negative):
        value = getattr(arguments, name)
        if value is not None and (not (0 <= value < math.inf) or (value == 0 and name in above_zero)):
            words = "above 0" if name in above_zero else "0 or more"
            raise UserError(f"--{name} is {value}; it must be {words}.")


def read_object(name: str, given: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """The value of an argument that is a JSON object."""
    try:
        content = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise UserError(f"--{name} is {given!r}; it must be a JSON object ({error}).") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"--{name} is {given!r}; it must be a JSON object.")
    return content


def read_rates(given: dict[str, Any] | str | None) -> dict[str, float]:
    """The learning rates by part, checked."""
    try:
        rates = json.loads(given) if isinstance(given, str) else given or {}
        rates = {part: float(rate) for part, rate in rates.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--learning_rates is {given!r}; it must be JSON such as '{{\"vision_tower\": 2e-6}}'."
        ) from error
    if unknown := sorted(set(rates) - set(PART_PREFIXES)):
        raise UserError(f"--learning_rates has the unknown parts {unknown}; known: {', '.join(PART_PREFIXES)}.")
    if wrong := {part: rate for part, rate in rates.items() if not 0 < rate < math.inf}:
        raise UserError(f"--learning_rates has {wrong}; rates must be above 0. A part is frozen by --train_parts.")
    return rates
