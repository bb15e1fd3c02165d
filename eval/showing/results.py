"""Finished evaluations as they lie on disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.reading.tables import Row, read_rows
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json


@dataclass(frozen=True)
class Result:
    """What a run has left in its folder.

    Attributes:
        folder: where it lies.
        facts: ``results.json``: the score and everything that it was made from.
        values: right or wrong (or a grade from 0 to 1) by the question's id; empty where nothing was scored.
    """

    folder: Path
    facts: dict[str, Any]
    values: dict[str, bool | float]

    @classmethod
    def load(cls, path: Path) -> "Result":
        """Read a result.

        Args:
            path: the folder, or its ``results.json``.

        Raises:
            UserError: if there is none, or a file is damaged.
        """
        folder = path.parent if path.name == "results.json" else path
        facts, values = (_read(folder / name) for name in ("results.json", "per_sample.json"))
        lacking = [name for name in ("benchmark", "status", "rule", "protocol", "model", "data") if name not in facts]
        if lacking:
            raise UserError(f"{folder / 'results.json'}: lacks {', '.join(lacking)}; give a result of eval.run.")
        return cls(folder, facts, values)

    @property
    def benchmark(self) -> str:
        """Name of the benchmark."""
        return self.facts["benchmark"]

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.facts["model"]["name"]

    def answers(self) -> list[Row]:
        """Read the answers, each with its question, in the order of the benchmark file."""
        return read_rows(self.folder / "answers.jsonl")


def find_results(places: Sequence[Path]) -> list[Result]:
    """Read all results in some folders and below, sorted by benchmark and model.

    Args:
        places: folders.

    Raises:
        UserError: if there are none, or two of one benchmark and model.
    """
    files = sorted({path for place in places for path in place.rglob("results.json")})
    found = sorted((Result.load(path) for path in files), key=lambda result: (result.benchmark, result.model))
    if not found:
        raise UserError(f"no results.json in {', '.join(map(str, places))} or below; evaluate first with eval.run.")
    for one, other in zip(found, found[1:], strict=False):
        if (one.benchmark, one.model) == (other.benchmark, other.model):
            raise UserError(
                f"{one.folder} and {other.folder} are both of {one.model} on {one.benchmark}; give one of them."
            )
    return found


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder that eval.run wrote.")
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, saw {type(value).__name__}.")
    return value
