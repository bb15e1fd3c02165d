"""The results of finished evaluations, read from their folders."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from eval.benchmark import Benchmark
from eval.benchmarks import get_benchmark
from eval.reading.tables import Row, read_rows, sha256
from eval.sample import Sample
from llava_skip_base.errors import UserError, first_few
from llava_skip_base.files import read_json
from llava_skip_base.texts import shortened

IMAGES = "images.json"
"""File of a result that says which image each question is about, so that questions about one are known."""


@dataclass(frozen=True)
class Result:
    """The result of one benchmark and model.

    Attributes:
        folder: of the run.
        facts: ``results.json``: the score and where it comes from.
        values: right or wrong (or a grade from 0 to 1) by the question's id; empty if nothing was scored.
    """

    folder: Path
    facts: dict[str, Any]
    values: dict[str, bool | float]

    @classmethod
    def load(cls, path: Path) -> "Result":
        """Read a result from its folder or ``results.json``.

        Raises:
            UserError: if there is none, or a file is damaged.
        """
        folder = path.parent if path.name == "results.json" else path
        facts, values = (_read(folder / name) for name in ("results.json", "per_sample.json"))
        lacking = [name for name, kinds in _FACTS.items() if not _is(_part(facts, name), kinds)]
        if lacking:
            raise UserError(
                f"{folder / 'results.json'}: lacks {', '.join(lacking)}, or they are of another kind; give a result "
                "of llava-skip eval."
            )
        get_benchmark(facts["benchmark"])
        if odd := [id_ for id_, value in values.items() if value is None or not _is(value, _NUMBER)]:
            raise UserError(f"{folder / 'per_sample.json'}: {first_few(odd)} values are no numbers; score it again.")
        return cls(folder, {"score": None, **facts}, values)

    @property
    def benchmark(self) -> str:
        """Name of the benchmark."""
        return self.facts["benchmark"]

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.facts["model"]["name"]

    def load_samples(self, benchmark: Benchmark) -> list[Sample]:
        """The questions with their images, from the benchmark file that was answered.

        Raises:
            UserError: it is gone, has changed since the evaluation, or its images are not to be found.
        """
        data = self.facts["data"]
        path, images = Path(data["path"]), data.get("images")
        if not (os.path.isfile(path) or os.path.isdir(path)) or sha256([path]) != data["sha256"]:
            raise UserError(f"{shortened(path)} is gone or has changed since the evaluation.")
        return benchmark.load(path, images and Path(images))

    def answers(self) -> list[Row]:
        """Read the answers, each with its question, in the order of the benchmark file.

        Raises:
            UserError: a line is no answer.
        """
        path = self.folder / "answers.jsonl"
        rows = read_rows(path)
        for number, row in enumerate(rows, start=1):
            if not all(isinstance(row.get(name), str) for name in ("index", "prompt", "prediction")):
                raise UserError(f"{path}, line {number}: lacks its index, prompt or prediction; evaluate again.")
        return rows


def find_results(places: Sequence[Path]) -> list[Result]:
    """Read all results in the folders `places` and below, sorted by benchmark and model.

    Raises:
        UserError: if there are none, or two of one benchmark and model.
    """
    files = sorted({path for place in places for path in place.rglob("results.json")})
    found = sorted((Result.load(path) for path in files), key=lambda result: (result.benchmark, result.model))
    if not found:
        raise UserError(f"no results.json in {', '.join(map(str, places))} or below; run llava-skip eval first.")
    for one, other in zip(found, found[1:], strict=False):
        if (one.benchmark, one.model) == (other.benchmark, other.model):
            raise UserError(
                f"{one.folder} and {other.folder} are both of {one.model} on {one.benchmark}; give one of them."
            )
    return found


_TEXT, _NUMBER = (str,), (int, float, NoneType)
_FACTS = {
    **dict.fromkeys(("benchmark", "status", "rule", "protocol", "model.name", "data.path", "data.sha256"), _TEXT),
    **{"score": _NUMBER, "full_score": _NUMBER, "data.images": (str, NoneType)},
    **dict.fromkeys(("generation", "versions", "judge"), (dict, NoneType)),
}
"""What a result must hold, and of which kinds."""


def _part(facts: Any, name: str) -> Any:
    for key in name.split("."):
        facts = facts.get(key) if isinstance(facts, dict) else None
    return facts


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not (isinstance(value, int) and value.bit_length() > 64)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder that llava-skip eval wrote.")
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, saw {type(value).__name__}.")
    return value
