import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from eval.score import app
from tests.support.predictions import Rows, write_predictions

ROOT = Path(__file__).parents[2]

PERFECT = {7: "A", 9: "C.", 1000007: "(B)", 1000009: "A", 2000009: "B"}


@pytest.fixture(autouse=True)
def no_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def score(tmp_path: Path) -> Callable[..., tuple[Result, dict[str, Any]]]:
    def run(benchmark: str, *options: object) -> tuple[Result, dict[str, Any]]:
        out = tmp_path / "out" / "score.json"
        done = CliRunner().invoke(app, [str(word) for word in [benchmark, "--json", out, *options]])
        return done, json.loads(out.read_text()) if out.exists() else {}

    return run


def test_a_programming_error_keeps_its_traceback_and_another_exit_code(tmp_path: Path, mmstar_rows: Rows) -> None:
    predictions = write_predictions(tmp_path / "answers.tsv", [{**row, "prediction": "A"} for row in mmstar_rows])
    planted = "from eval import score; score.match = lambda *_: (1,); score.main()"
    options = ["mmstar", "--predictions", str(predictions), "--json", str(tmp_path / "score.json")]
    command = [sys.executable, "-c", planted, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ValueError: not enough values to unpack" in done.stderr


@pytest.mark.parametrize("suffix", ["xlsx", "tsv", "json", "jsonl"])
def test_mmstar_alone(score: Callable[..., Any], tmp_path: Path, mmstar_rows: Rows, suffix: str) -> None:
    rows = [{**row, "prediction": "A"} for row in mmstar_rows]
    for row in rows:
        del row["image"]
    done, result = score("mmstar", "--predictions", write_predictions(tmp_path / f"p.{suffix}", rows))
    assert done.exit_code == 0, done.output
    assert result["scores"]["final score"] == 2 / 5
    assert result["scores"]["math(statistical reasoning)"] == 1.0
    assert any("no --data was given" in note for note in result["notes"])


def test_skip_vision_json(score: Callable[..., Any], tmp_path: Path, mmstar_rows: Rows) -> None:
    keys = ("question", "answer", "category", "l2_category")
    rows = [
        {**{key: row[key] for key in keys}, "question_id": row["index"], "image_path": "x.jpg", "prediction": "D"}
        for row in mmstar_rows
    ]
    done, result = score("mmstar", "--predictions", write_predictions(tmp_path / "p.json", rows))
    assert result["score"] == pytest.approx(20.0), done.output


@pytest.mark.parametrize("suffix", ["xlsx", "tsv"])
def test_vlmevalkit_file_alone(score: Callable[..., Any], tmp_path: Path, mmbench_rows: Rows, suffix: str) -> None:
    rows = [{**row, "prediction": PERFECT[row["index"]]} for row in mmbench_rows]
    for row in rows:
        del row["image"]
    done, result = score("mmbench", "--predictions", write_predictions(tmp_path / f"p.{suffix}", rows))
    assert done.exit_code == 0, done.output
    assert result["score"] == 100.0
    assert result["scores"]["dev"]["L2"] == {"FP-S": 1.0, "LR": 1.0}


def test_llava_submission_xlsx_alone(score: Callable[..., Any], tmp_path: Path, mmbench_rows: Rows) -> None:
    order = ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    rows = [{**row, "prediction": "A"} for row in mmbench_rows]
    rows = [{key: row[key] for key in order} for row in rows]
    _, result = score("mmbench", "--predictions", write_predictions(tmp_path / "p.xlsx", rows))
    assert result["scores"]["dev"]["vanilla"] == {"main_rows": 0.5, "all_rows": 0.4}
    assert result["scores"]["dev"]["L3"] == {}


def test_llava_jsonl_with_data(
    score: Callable[..., Any], tmp_path: Path, write_tsv: Callable[..., Path], mmbench_rows: Rows
) -> None:
    rows = [
        {"question_id": index, "round_id": 0, "prompt": "?", "text": text, "options": ["x"], "metadata": {}}
        for index, text in reversed(PERFECT.items())
    ]
    predictions = write_predictions(tmp_path / "p.jsonl", rows)
    done, result = score("mmbench", "--predictions", predictions, "--data", write_tsv(mmbench_rows))
    assert done.exit_code == 0, done.output
    assert result["score"] == 100.0
    assert result["counts"]["unknown"] == 0
    done, _ = score("mmbench", "--predictions", predictions)
    assert done.exit_code == 2
    assert "lacks the columns question, A, B" in done.stderr
    assert "--data" in done.stderr


def test_a_result_that_cannot_be_written_is_one_message(tmp_path: Path, mmstar_rows: Rows) -> None:
    predictions = write_predictions(
        tmp_path / "p.jsonl", [{**row, "image": "", "prediction": "A"} for row in mmstar_rows]
    )
    for output in (tmp_path, predictions / "x.json"):
        done = CliRunner().invoke(app, ["mmstar", "--predictions", str(predictions), "--json", str(output)])
        assert (done.exit_code, done.stderr[:6], done.stderr.count("\n")) == (2, "error:", 1)


def test_one_row_a_question_is_refused(score: Callable[..., Any], tmp_path: Path, mmbench_rows: Rows) -> None:
    rows = [{**row, "image": "", "prediction": "A"} for row in mmbench_rows[:2]]
    done, result = score("mmbench", "--predictions", write_predictions(tmp_path / "p.tsv", rows))
    assert done.exit_code == 2
    assert "2 (7, 9) questions have fewer passes than options" in done.stderr
    assert result == {}


def test_missing_unknown_and_double_rows(
    score: Callable[..., Any], tmp_path: Path, write_tsv: Callable[..., Path], mmstar_rows: Rows
) -> None:
    data = write_tsv(mmstar_rows)
    rows = [{"index": index, "prediction": "A"} for index in (0, 1, 2, 4, 77)]
    predictions = write_predictions(tmp_path / "p.tsv", rows)
    done, _ = score("mmstar", "--predictions", predictions, "--data", data)
    assert done.exit_code == 2
    assert "1 (3) of 5 predictions are missing" in done.stderr
    done, result = score("mmstar", "--predictions", predictions, "--data", data, "--allow-missing")
    assert done.exit_code == 0
    assert result["scores"]["final score"] == 2 / 5
    assert (result["counts"]["missing"], result["counts"]["unknown"]) == (1, 1)
    assert "1 (3) of 5 predictions are missing and count as wrong" in done.output
    assert "1 (77) of 5 predictions are not in the benchmark file" in done.output
    done, _ = score("mmstar", "--predictions", write_predictions(tmp_path / "q.tsv", [*rows, rows[0]]), "--data", data)
    assert done.exit_code == 2
    assert "ids occur more than once: 1 (0)" in done.stderr


def test_mmvet_grade_file(score: Callable[..., Any], tmp_path: Path, mmvet_data: Path) -> None:
    grades = {f"v1_{n}": {"model": ["j"], "content": ["0.5"], "score": [0.5 * n]} for n in range(3)}
    path = tmp_path / "m_gpt-4-0613-grade-1runs.json"
    path.write_text(json.dumps(grades))
    done, result = score("mmvet", "--predictions", path, "--data", mmvet_data)
    assert done.exit_code == 0, done.output
    assert (result["scores"]["total"], result["scores"]["rec"], result["scores"]["ocr"]) == (50.0, 75.0, 0.0)


def test_mmvet_predictions_need_a_judge(
    score: Callable[..., Any], tmp_path: Path, mmvet_data: Path, judge_server: Callable[..., Any]
) -> None:
    rows = [{"question_id": n, "text": "something"} for n in range(3)]
    predictions = write_predictions(tmp_path / "p.jsonl", rows)
    done, result = score("mmvet", "--predictions", predictions, "--data", mmvet_data)
    assert done.exit_code == 1
    assert (result["status"], result["score"]) == ("unscored", None)
    server = judge_server(["0.5"])
    options = ("--data", mmvet_data, "--judge-url", server.url, "--judge-model", "m")
    done, result = score("mmvet", "--predictions", predictions, *options)
    assert (done.exit_code, result["score"]) == (0, 50.0)
    assert (tmp_path / "out" / "p_m-grade-1runs.json").exists()


def test_scoring_loads_no_torch(tmp_path: Path, mmstar_rows: Rows) -> None:
    rows = [{**row, "image": "", "prediction": "A"} for row in mmstar_rows]
    predictions = write_predictions(tmp_path / "p.jsonl", rows)
    code = (
        "import sys; from eval.score import app; "
        "app(sys.argv[1:], standalone_mode=False); "
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)"
    )
    words = ["mmstar", "--predictions", str(predictions), "--json", str(tmp_path / "out.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["scores"]["final score"] == 0.4


def test_gain_and_leakage_from_results_and_predictions(
    score: Callable[..., Any], tmp_path: Path, mmstar_rows: Rows
) -> None:
    def predictions(name: str, letters: str) -> Path:
        rows = [{**row, "image": "", "prediction": letter} for row, letter in zip(mmstar_rows, letters, strict=True)]
        return write_predictions(tmp_path / name, rows)

    done, blind = score("mmstar", "--predictions", predictions("blind.jsonl", "AAAAA"))
    (tmp_path / "blind.json").write_text(json.dumps(blind))
    given = ("--without-image", tmp_path / "blind.json", "--language-model", predictions("language.xlsx", "AXXXX"))
    done, result = score("mmstar", "--predictions", predictions("whole.jsonl", "ABCDX"), *given)
    assert done.exit_code == 0, done.output
    assert result["scores"]["gain and leakage"] == pytest.approx(
        {
            **{"with image": 80, "without image": 40, "language model": 20},
            "multi-modal gain": 40,
            "multi-modal leakage": 20,
        }
    )
    assert result["scores"]["final score"] == 0.8
    done, _ = score("mmstar", "--rule", "lmms-eval", "--predictions", predictions("whole.jsonl", "ABCDX"), *given)
    assert done.exit_code == 2
    assert "holds 40.0 by the rule mmstar-official" in done.stderr
    done, _ = score("mmstar", "--predictions", predictions("whole.jsonl", "ABCDX"), *given[:2])
    assert "give --without-image and --language-model together" in done.stderr


def test_rule_and_submission(score: Callable[..., Any], tmp_path: Path, mmbench_rows: Rows) -> None:
    rows = [{**row, "image": "", "prediction": PERFECT[row["index"]]} for row in mmbench_rows]
    predictions = write_predictions(tmp_path / "p.jsonl", rows)
    options = ("--rule", "lmms-eval", "--submission", tmp_path / "sent.xlsx")
    done, result = score("MMBench", "--predictions", predictions, *options)
    assert (done.exit_code, result["rule"]) == (0, "mmbench-circular/lmms-eval-2026-08")
    assert result["per_sample"] == {"7": True, "9": True}
    _, again = score("mmbench", "--predictions", tmp_path / "sent.xlsx")
    assert again["score"] == 100.0
    done, _ = score("mmbench", "--predictions", predictions, "--rule", "none")
    assert done.exit_code == 2
    done, _ = score("mmstar", "--predictions", predictions, "--submission", tmp_path / "x.json")
    assert done.exit_code == 2


def test_vlmevalkits_graded_mmvet(score: Callable[..., Any], tmp_path: Path) -> None:
    rows = [
        {
            "index": n,
            "question": "?",
            "answer": "!",
            "category": kind,
            "prediction": "x",
            "score": value,
            "log": "Succeed",
        }
        for n, (kind, value) in enumerate([("ocr,math", 0.5), ("rec", 0.3), ("rec", 0)])
    ]
    predictions = write_predictions(tmp_path / "p.xlsx", rows)
    _, result = score("mmvet", "--predictions", predictions, "--rule", "vlmevalkit")
    assert result["scores"]["Overall"] == pytest.approx(80 / 3)
    assert result["scores"]["combinations"] == {"rec": 15.0, "ocr_math": 50.0}
    _, result = score("mmvet", "--predictions", predictions)
    assert (result["scores"]["total"], result["scores"]["runs"]) == (26.7, [26.7])
