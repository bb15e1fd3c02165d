import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.benchmarks.hallusionbench import HallusionBench, verdict
from eval.score import score_file
from eval.scoring.judge import Judge
from llava_skip_base.errors import UserError

FIELDS = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "gt_answer")
PLACES = [
    ("VD", "ocr", "1", "0", "0", "0", "1"),
    ("VD", "ocr", "1", "0", "0", "1", "0"),
    ("VD", "ocr", "2", "0", "1", "0", "0"),
    ("VS", "ocr", "0", "0", "0", "0", "1"),  # no figure
    ("VS", "ocr", "1", "0", "1", "0", "1"),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "hallusion_bench"
    rows = []
    for place in PLACES:
        row = dict(zip(FIELDS, place, strict=True))
        name = f"{row['category']}/{row['subcategory']}/{row['set_id']}_{row['figure_id']}.png"
        shown = row["visual_input"] != "0"
        if shown:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(folder / name)
        row |= {"question": "Is it?", "sample_note": "x", "gt_answer_details": "It is so."}
        rows.append({**row, "filename": f"./hallusion_bench/{name}" if shown else None})
    path = tmp_path / "HallusionBench.json"
    path.write_text(json.dumps(rows))
    return path


def ids(rows: list[Any]) -> list[str]:
    return ["_".join(place[n] for n in (0, 1, 3, 4, 5)) for place in rows]


def write_answers(path: Path, answers: dict[str, str]) -> Path:
    path.write_text(json.dumps(answers))
    return path


def test_by_question_by_figure_and_over_figures(data: Path, tmp_path: Path) -> None:
    shown = [place for place in PLACES if place[2] != "0"]
    said = dict(zip(ids(shown), ["Yes.", "no", "It is", "yes, no doubt"], strict=True))
    score = score_file(HallusionBench(), write_answers(tmp_path / "a.json", said), data, False, None)
    assert {name: score.scores[name] for name in ("aAcc", "fAcc", "qAcc")} == {
        "aAcc": 50.0,
        "fAcc": 50.0,  # the second figures of VD and VS count as one for VLMEvalKit
        "qAcc": 50.0,  # and so do their first questions
    }
    assert score.scores["parts"]["VS"] == {"aAcc": 0.0, "fAcc": 0.0, "qAcc": 0.0}
    assert score.counts["unreadable"] == 2 and score.counts["without_figure"] == 0
    assert list(score.per_sample.values()) == [True, True, False, False]
    score = score_file(HallusionBench("contains-yes"), tmp_path / "a.json", data, False, None)
    assert {name: score.scores[name] for name in ("aAcc", "fAcc", "qAcc")} == dict.fromkeys(
        ("aAcc", "fAcc", "qAcc"), 100.0
    )


def test_ids_of_vlmevalkit_and_figures(data: Path, tmp_path: Path) -> None:
    samples = HallusionBench().load(data)
    assert [sample.id for sample in samples] == ids([place for place in PLACES if place[2] != "0"])
    assert HallusionBench().prompts(samples) == ["Is it?"] * 4 and all(len(sample.images) == 1 for sample in samples)
    said = {f"hallusionbench_{sample.id}": "Yes" for sample in samples}
    assert score_file(HallusionBench(), write_answers(tmp_path / "a.json", said), data, False, None).score == 50.0
    # By the official rule the questions without a figure are asked too.
    samples = HallusionBench("official").load(data)
    assert [len(sample.images) for sample in samples] == [1, 1, 1, 0, 1]


def test_a_row_without_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"index": "7", "question": "?", "answer": "Yes", "prediction": "no"}]))
    with pytest.raises(UserError, match="lacks the columns category"):
        score_file(HallusionBench(), tmp_path / "a.json", None, False, None)


@pytest.mark.parametrize(
    ("reply", "word"),
    [
        ("Incorrect.", "incorrect"),
        ("correct", "correct"),
        ("It is correct, not incorrect", "incorrect"),
        ("?", "unclear"),
    ],
)
def test_what_the_judge_said(reply: str, word: str) -> None:
    assert verdict(reply) == word


def test_the_official_rule_asks_a_judge(data: Path, tmp_path: Path, judge_server: Callable[..., Any]) -> None:
    answers = write_answers(tmp_path / "a.json", dict.fromkeys(ids(PLACES), "It is."))
    score = score_file(HallusionBench("official"), answers, data, False, None)
    assert score.status == "unscored" and "needs a judge" in score.notes[-1]
    server = judge_server(["correct", "incorrect", "unclear", "unclear", "Correct"])
    judge = Judge(server.url, tmp_path / "judged", "tiny", concurrency=1, backoff=0.01)
    score = score_file(HallusionBench("official"), answers, data, False, judge)
    assert "Reference: It is so.\nAnswer: It is.\nVerdict: " in server.requests[0]["messages"][0]["content"]
    # Not to know is right for the fourth question, which has no figure, and wrong for the third.
    assert list(score.per_sample.values()) == [True, False, False, True, True]
    assert score.scores["aAcc"] == 60.0 and score.counts["unclear"] == 2
    assert score.scores["fAcc"] == pytest.approx(100 / 3) and score.scores["qAcc"] == pytest.approx(100 / 3)
    # The replies are kept.
    again = score_file(HallusionBench("official"), answers, data, False, judge)
    assert again.scores == score.scores and len(server.requests) == 5
    down = Judge(judge_server([500]).url, tmp_path / "down", "tiny", retries=0, backoff=0.01)
    score = score_file(HallusionBench("official"), answers, data, False, down)
    assert score.status == "incomplete" and "Run again to go on." in score.notes[-1]
