import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from eval.compare import app
from eval.study.statistics.pairs import compare
from llava_skip_base.files import write_json

FACTS: dict[str, Any] = {
    "benchmark": "mmstar",
    "status": "scored",
    "score": 50.0,
    "rule": "mmstar-official",
    "protocol": "skip-vision",
    "data": {"path": "mmstar.tsv", "sha256": "d"},
    "generation": {"max_new_tokens": 1024},
    "judge": None,
}


def save(folder: Path, values: dict[str, bool | float], **facts: Any) -> Path:
    write_json(folder / "results.json", {**FACTS, "model": {"name": folder.name}, **facts})
    write_json(folder / "per_sample.json", values)
    return folder


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "160"})


def right(count: int, of: int = 100) -> dict[str, bool | float]:
    return {str(number): number < count for number in range(of)}


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1.0), (1, 1, 1.0), (0, 5, 0.0625), (0, 6, 0.03125), (2, 10, 0.03857421875)],  # exact binomial, both sides
)
def test_mcnemar_counts_only_the_questions_that_differ(only_a: int, only_b: int, p: float) -> None:
    both = [True] * 20 + [False] * 10
    a = np.array(both + [True] * only_a + [False] * only_b)
    b = np.array(both + [False] * only_a + [True] * only_b)
    found = compare(a, b)
    assert (found.only_a, found.only_b, found.questions) == (only_a, only_b, 30 + only_a + only_b)
    assert found.p == pytest.approx(p)
    assert found.within_noise == (p > 0.05)


def test_intervals_hold_the_normal_approximation_and_do_not_change() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random(2000) < 0.6, rng.random(2000) < 0.7
    found = compare(a, b)
    assert found == compare(a, b)
    half = 196 * np.sqrt(a.mean() * (1 - a.mean()) / 2000)
    assert found.a.value == pytest.approx(100 * a.mean())
    assert (found.a.high - found.a.low) / 2 == pytest.approx(half, rel=0.05)
    spread = 196 * (b.astype(float) - a).std() / np.sqrt(2000)
    assert (found.difference.high - found.difference.low) / 2 == pytest.approx(spread, rel=0.05)
    assert not found.within_noise


def test_grades_take_a_permutation_test() -> None:
    rng = np.random.default_rng(2)
    a = rng.random(200).round(1)
    same, better = compare(a, a), compare(a, np.clip(a + 0.1 * (rng.random(200) < 0.5), 0, 1))
    assert (same.p, same.within_noise) == (1.0, True)
    assert better.test.startswith("paired permutation")
    assert better.p < 0.001
    assert better.difference.low > 0


def test_command_says_what_is_noise_and_writes_json(tmp_path: Path) -> None:
    a, b, c = (
        save(tmp_path / name, right(count), score=count) for name, count in zip("abc", (50, 53, 70), strict=True)
    )
    done = run(a, b / "results.json", "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    assert "within noise" in done.output and "McNemar" in done.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["only_b"], written["p"], written["difference"]["value"]) == (3, 0.25, pytest.approx(3.0))
    assert written["results"]["b"]["model"]["name"] == "b"
    assert written["method"] == {"confidence": 0.95, "resamples": 10_000, "seed": 0}
    assert "more than noise" in run(a, c).output


@pytest.mark.parametrize(
    ("facts", "values", "message"),
    [
        ({"data": {"path": "x", "sha256": "e"}}, right(1), "data: d and e"),
        ({"protocol": "vlmevalkit"}, right(1), "protocol: skip-vision and vlmevalkit"),
        ({"rule": "mmstar-lmms"}, right(1), "rule: mmstar-official and mmstar-lmms"),
        ({"generation": {"max_new_tokens": 16}}, right(1), "max_new_tokens: 1024 and 16"),
        ({}, right(1, 99), r"1 \(99\) questions are in one of the results only"),
        ({"status": "unscored", "score": None}, {}, "is unscored"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(
    tmp_path: Path, facts: dict[str, Any], values: dict[str, bool | float], message: str
) -> None:
    done = run(save(tmp_path / "a", right(50)), save(tmp_path / "b", values, **facts))
    assert done.exit_code == 2
    assert re.search(message, done.stderr), done.stderr


def test_missing_or_damaged_results_are_named(tmp_path: Path) -> None:
    a = save(tmp_path / "a", right(5))
    assert "no such file; give the folder that llava-skip eval wrote" in run(a, tmp_path / "gone").stderr
    (tmp_path / "b").mkdir()
    (tmp_path / "b/results.json").write_text("{")
    assert "results.json is not valid JSON" in run(a, tmp_path / "b").stderr
    (tmp_path / "b/results.json").write_text("{}")
    (tmp_path / "b/per_sample.json").write_text("{}")
    assert "lacks benchmark, status" in run(a, tmp_path / "b").stderr
