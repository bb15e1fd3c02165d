"""The official text for the judge, and the official reports beside the result."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import eval.answering.generate
import eval.run
import eval.score
from eval.benchmarks.mathvista import extraction_prompt
from eval.benchmarks.mmvet import MMVet
from eval.scoring.grading import WORKED_CASES
from tests.eval.test_foreign_runs import Echo

TEXT = "Give a grade.\n\nQuestion | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\nx | y | z | 0.5\n"
HEADER = ["", "rec", "ocr", "math", "total", "std", "runs"]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(eval.answering.generate, "Generator", Echo)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "p.json").write_text(json.dumps({f"v1_{n}": f"answer {n}" for n in range(3)}))

    def run(app: Any, *words: object) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words])

    return run


def read(path: str) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_the_official_text_is_what_the_judge_reads(
    start: Callable[..., Result], mmvet_data: Path, judge_server: Callable[..., Any]
) -> None:
    server = judge_server(["0.5"])
    words = ["mmvet", "--predictions", "p.json", "--data", mmvet_data, "--json", "out.json", "--judge-url", server.url]
    done = start(eval.score.app, *words, "--judge-prompt", "text.txt", "--judge-concurrency", 1)
    assert done.exit_code == 0, done.output
    asked = [request["messages"][0]["content"] for request in server.requests]
    assert asked[0] == TEXT + "\nx? | -1 <AND> -5 | answer 0 | "  # as the official script joins them
    assert json.loads(Path("out.json").read_text())["judge"]["prompt_sha256"]
    done = start(eval.score.app, *words)  # another text: the saved grades are not taken for its own
    assert done.exit_code == 2 and "its replies on 3 (v1_0, v1_1, v1_2) questions are of other answers" in done.stderr


def test_mistakes_with_the_official_text(start: Callable[..., Result], mmvet_data: Path) -> None:
    words = ["mmvet", "--predictions", "p.json", "--data", mmvet_data, "--json", "o.json", "--judge-prompt"]
    assert "is given and no judge" in start(eval.score.app, *words, "text.txt").stderr
    assert "has no gone.txt" in start(eval.score.app, *words, "gone.txt").stderr
    Path("empty.txt").write_text("\n")
    assert "empty.txt: is empty" in start(eval.score.app, *words, "empty.txt").stderr
    done = start(eval.score.app, "mmstar", *words[1:], "text.txt")
    assert done.exit_code == 2 and "0 of those chosen take one (mmvet and mathvista do)" in done.stderr


def test_the_official_form_of_mathvista() -> None:
    fields = {"question": "How many?", "query": "Hint: ...", "choices": [], "question_type": "free_form"}
    asked = extraction_prompt(fields, "There are 7.", "\nRead the examples.\n\n")
    assert asked == "Read the examples.\n\nHow many?\n\nThere are 7.\n\nExtracted answer: "


def test_the_official_reports_of_a_run(
    start: Callable[..., Result], mmvet_data: Path, judge_server: Callable[..., Any], model_folder: Path
) -> None:
    server = judge_server(["1.0", "0.0", "0.9", "0.5", "0.0", "0.0"])
    words = ["--benchmarks", "mmvet", "--model", model_folder, "--data", mmvet_data, "--judge-url", server.url]
    words += ["--judge-model", "local/judge", "--judge-runs", 2, "--judge-concurrency", 1]
    assert start(eval.run.app, *words).exit_code == 0
    folder = "results/mmvet/tiny/tiny_local-judge"
    assert read(f"{folder}-cap-score-2runs.csv") == [
        HEADER,
        ["tiny", "22.5", "75.0", "75.0", "40.0", "23.3", "[63.3, 16.7]"],
    ]
    assert read(f"{folder}-cap-int-score-2runs.csv") == [
        ["", "rec", "ocr_math", "total", "std", "runs"],
        ["tiny", "22.5", "75.0", "40.0", "23.3", "[63.3, 16.7]"],
    ]


def test_the_official_reports_of_a_grade_file(start: Callable[..., Result], mmvet_data: Path) -> None:
    grades = {f"v1_{n}": {"model": ["j"], "content": ["0.5"], "score": [0.5]} for n in range(3)}
    Path("llava_gpt-4-0613-grade-1runs.json").write_text(json.dumps(grades))
    words = ["--data", mmvet_data, "--json", "out/o.json", "--predictions", "llava_gpt-4-0613-grade-1runs.json"]
    assert start(eval.score.app, "mmvet", *words).exit_code == 0
    assert read("out/llava_gpt-4-0613-cap-score-1runs.csv")[1] == [
        *("llava_gpt-4-0613", "50.0", "50.0", "50.0", "50.0", "0.0", "[50.0]")
    ]
    assert (
        start(eval.score.app, "mmvet", *words[:2], "--json", "v/o.json", *words[4:], "--rule", "vlmevalkit").exit_code
        == 0
    )
    assert not list(Path("v").glob("*.csv"))  # that rule has no such report


def test_without_a_text_the_projects_own_is_used(
    mmvet_data: Path, judge_server: Callable[..., Any], tmp_path: Path
) -> None:
    from eval.scoring.judge import Judge

    server = judge_server(["0.5"])
    judge = Judge(server.url, tmp_path, "tiny", "judge", concurrency=1)
    MMVet().score(MMVet().load(mmvet_data), {f"v1_{n}": "a" for n in range(3)}, judge)
    assert all(" | ".join(case) in server.requests[0]["messages"][0]["content"] for case in WORKED_CASES)
    assert "prompt_sha256" not in judge.describe()
