import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks.mmvet import MMVet
from eval.errors import JudgeUnavailable
from eval.scoring.grading import WORKED_CASES, grading_prompt, parse_grade
from eval.scoring.judge import Judge
from llava_skip_base.errors import UserError

ANSWERS = {"v1_0": "-1 | and\n-5", "v1_1": "there", "v1_2": "thus"}
Start = Callable[[list[str | int | bytes]], Any]


def make_judge(server: Any, folder: Path, runs: int = 1, retries: int = 2) -> Judge:
    return Judge(
        server.url, folder, "tiny", "local/judge", runs, retries=retries, timeout=10, concurrency=1, backoff=0.01
    )


def test_averages_by_hand(mmvet_data: Path) -> None:
    samples = MMVet().load(mmvet_data)
    grades = {
        "v1_0": {"model": ["j", "j"], "content": ["1.0", "0.5"], "score": [1.0, 0.5]},
        "v1_1": {"model": ["j", "j"], "content": ["0.0", "0.0"], "score": [0.0, 0.0]},
        "v1_2": {"model": ["j", "j"], "content": ["0.9", "x"], "score": [0.9, 0.0]},
    }
    score = MMVet().score_grades(samples, grades)
    # Run totals 63.33 and 16.67: mean 40.0, population deviation 23.33; rec (45 + 0) / 2, ocr and math (100 + 50) / 2.
    assert score.scores == {
        "rec": 22.5,
        "ocr": 75.0,
        "math": 75.0,
        "total": 40.0,
        "std": 23.3,
        "runs": [63.3, 16.7],
        "combinations": {"rec": 22.5, "ocr_math": 75.0},
    }
    assert score.score == 40.0
    assert score.counts["runs"] == 2
    assert score.counts["replies_without_grade"] == 1


def test_rounding_is_numpys(mmvet_data: Path) -> None:
    samples = MMVet().load(mmvet_data)[:1]
    # Python's round gives 46.5; the official values are rounded by NumPy.
    assert MMVet().score_grades(samples, {"v1_0": {"score": [0.4645]}}).score == 46.4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v1_1": {"score": [0.5]}}, r"1 \(v1_1\) of 3 questions lack grades of 2 runs"),
        ({"v1_1": {"score": [0.5, 1.5]}}, r"question v1_1 has the grade 1.5; expected a number from 0 to 1"),
        ({"v1_1": {"score": [0.5, "good"]}}, r"question v1_1 has the grade 'good'"),
        ({"v1_1": {"score": [0.5, float("nan")]}}, r"question v1_1 has the grade nan"),
    ],
)
def test_incomplete_or_impossible_grades_are_refused(mmvet_data: Path, change: dict[str, Any], message: str) -> None:
    grades = {f"v1_{n}": {"score": [0.5, 0.5]} for n in range(3)} | change
    with pytest.raises(UserError, match=message):
        MMVet().score_grades(MMVet().load(mmvet_data), grades)


def test_capabilities_as_text(tmp_path: Path) -> None:
    rows = [{"id": "v1_0", "question": "?", "answer": "!", "capability": "ocr,rec"}]
    score = MMVet().score_grades(MMVet().samples(rows), {"v1_0": {"score": [1]}})
    assert score.scores["combinations"] == {"rec_ocr": 100.0}


@pytest.mark.parametrize(
    ("reply", "grade"),
    [("0.5", 0.5), ("1", 1.0), ("0.3 because", 0.3), ("0.7\n", 0.7), (" 0.5", None), ("1.1", None), ("-0.1", None)]
    + [("good", None), ("", None), ("nan", None)],
)
def test_parse_grade(reply: str, grade: float | None) -> None:
    assert parse_grade(reply) == grade


def test_prompt_structure(mmvet_data: Path) -> None:
    prompt = grading_prompt(MMVet().load(mmvet_data)[0], "-1 | and\n-5")
    assert prompt.endswith("\n\nx? | -1 <AND> -5 | -1 | and\n-5 | ")
    assert "\n\nQuestion | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n" in prompt
    assert [case[3] for case in WORKED_CASES] == ["0.0", "0.5", "0.5", "0.5", "1.0", "0.4", "1.0"]


def test_good_judge(judge_server: Start, mmvet_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    server = judge_server(["1.0", "0.0", "0.5"])
    samples = MMVet().load(mmvet_data)
    score = MMVet().score(samples, ANSWERS, make_judge(server, tmp_path / "out"))
    assert score.status == "scored"
    assert score.score == 50.0
    assert score.judge == {"model": "local/judge", "url": server.url, "runs": 1}
    first = server.requests[0]
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("local/judge", 0.0, 3)
    assert first["messages"] == [{"role": "user", "content": grading_prompt(samples[0], ANSWERS["v1_0"])}]
    assert server.keys[0] == "Bearer sk-very-secret"
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert "sk-very-secret" not in written + repr(score)
    grades = json.loads((tmp_path / "out" / "tiny_local-judge-grade-1runs.json").read_text())
    assert {key: grades["v1_2"][key] for key in ("model", "content", "score")} == {
        "model": ["local/judge"],
        "content": ["0.5"],
        "score": [0.5],
    }


@pytest.mark.parametrize("trouble", [429, 500, 503, b"<html>busy</html>", b'{"choices": []}', b'"text"'])
def test_passing_trouble_changes_nothing(
    judge_server: Start, mmvet_data: Path, tmp_path: Path, trouble: int | bytes
) -> None:
    server = judge_server(["1.0", trouble, "0.0", trouble, "0.5"])
    score = MMVet().score(MMVet().load(mmvet_data), ANSWERS, make_judge(server, tmp_path))
    assert score.score == 50.0
    assert len(server.requests) == 5


def test_reply_that_is_no_grade_is_asked_again(judge_server: Start, mmvet_data: Path, tmp_path: Path) -> None:
    server = judge_server(["good", "2.0", "1.0"])
    samples = MMVet().load(mmvet_data)[:1]
    assert MMVet().score(samples, ANSWERS, make_judge(server, tmp_path)).score == 100.0
    assert [request["temperature"] for request in server.requests] == [0.0, 0.0, 0.5]
    texts = [request["messages"][0]["content"] for request in server.requests]
    assert texts[1] == texts[2] == texts[0] + "\nPredict the correctness of the answer (digit): "


def test_judge_that_never_grades_gives_zero_and_says_so(judge_server: Start, mmvet_data: Path, tmp_path: Path) -> None:
    server = judge_server(["no idea"])
    score = MMVet().score(MMVet().load(mmvet_data)[:1], ANSWERS, make_judge(server, tmp_path))
    assert score.score == 0.0
    assert [request["temperature"] for request in server.requests] == [0.0, 0.0, 0.5, 1.0, 1.5]
    assert score.notes == ["1 replies of the judge held no grade and count as 0.0."]


@pytest.mark.parametrize("trouble", [500, 429, 401])
def test_outage_is_incomplete_and_goes_on_later(
    judge_server: Start, mmvet_data: Path, tmp_path: Path, trouble: int
) -> None:
    samples = MMVet().load(mmvet_data)
    broken = judge_server(["1.0", "0.0", "0.5", "0.5", trouble])
    score = MMVet().score(samples, ANSWERS, make_judge(broken, tmp_path, runs=2))
    assert (score.status, score.score, score.scores) == ("incomplete", None, {})
    assert (score.counts["grades"], score.counts["grades_wanted"]) == (4, 6)
    assert f"HTTP {trouble}" in score.notes[0]

    healed = judge_server(["0.5"])
    score = MMVet().score(samples, ANSWERS, make_judge(healed, tmp_path, runs=2))
    assert len(healed.requests) == 2
    assert score.scores["runs"] == [50.0, 50.0]


def test_nobody_listens(mmvet_data: Path, tmp_path: Path) -> None:
    judge = Judge("http://127.0.0.1:9/v1", tmp_path, "tiny", retries=0)
    with pytest.raises(JudgeUnavailable, match="ConnectError after 0 retries"):
        judge.ask("?", 0.0, 3)


def test_grades_of_other_answers_are_refused(judge_server: Start, mmvet_data: Path, tmp_path: Path) -> None:
    samples = MMVet().load(mmvet_data)
    judge = make_judge(judge_server(["1.0"]), tmp_path)
    MMVet().score(samples, ANSWERS, judge)
    with pytest.raises(UserError, match=r"replies on 1 \(v1_1\) questions are of other answers"):
        MMVet().score(samples, ANSWERS | {"v1_1": "changed"}, judge)


def test_no_judge_no_score(mmvet_data: Path) -> None:
    score = MMVet().score(MMVet().load(mmvet_data), ANSWERS)
    assert (score.status, score.score) == ("unscored", None)
    assert "no score was computed" in score.notes[0]


def test_judge_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="judge URL 'localhost:8000'"):
        Judge("localhost:8000", tmp_path, "x")
    with pytest.raises(UserError, match="judge runs 0"):
        Judge("http://localhost/v1", tmp_path, "x", runs=0)
    with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
        Judge("https://me:pass@host/v1", tmp_path, "x")
    assert "pass" not in str(caught.value)


def test_lost_image_is_named(mmvet_data: Path) -> None:
    (mmvet_data.parent / "images" / "b.jpg").unlink()
    with pytest.raises(UserError, match=r"b\.jpg\) image files do not exist"):
        MMVet().load(mmvet_data)


@pytest.mark.parametrize(("rule", "rec"), [("official", 26.7), ("vlmevalkit", 100 * (0.0 + 2 * 0.5 + 2 * 0.3) / 5)])
def test_vlmevalkit_counts_a_single_capability_twice(mmvet_data: Path, rule: str, rec: float) -> None:
    samples = MMVet().load(mmvet_data, with_images=False)
    samples[0].fields["capability"] = ["rec", "ocr"]
    grades = {
        sample.id: {"score": [value], "content": ["x"]} for sample, value in zip(samples, (0.0, 0.5, 0.3), strict=True)
    }
    scores = MMVet(rule).score_grades(samples, grades).scores
    assert (scores["rec"], scores["ocr"]) == (pytest.approx(rec), 0.0)
    assert scores["combinations"]["rec"] == (pytest.approx(rec) if rule == "vlmevalkit" else 40.0)
    assert scores["combinations"]["rec_ocr"] == 0.0
