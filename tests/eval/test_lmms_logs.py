import json
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks import BENCHMARKS
from eval.score import score_file
from llava_skip_base.errors import UserError

SHORT = "\nAnswer the question using a single word or phrase."
PLACE = {"category": "color", "answer": "Yes"}
CHOICE = {"question": "Which?", "hint": "nan", "A": "cat", "B": "dog", "C": "nan", "D": "nan", "category": "ocr"}
# By benchmark: rows as on Hugging Face, what the metrics of lmms-eval 0.7 log of each, and answers of which the
# first alone is right.
LOGS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]] = {
    "mmbench": (
        [{"index": n + p * 1000000, **CHOICE, "answer": "BA"[n - 1]} for p in (0, 1) for n in (1, 2)],
        [
            {name: {"index": n + p * 1000000, **CHOICE, "answer": "BA"[n - 1], "prediction": "x", "E": "nan"}}
            for name in ("gpt_eval_score",)
            for p in (0, 1)
            for n in (1, 2)
        ],
        ["B", "A", "B.", "B"],
    ),
    "mmstar": (
        [{"index": n, **CHOICE, "answer": "A", "category": "math", "l2_category": "geometry"} for n in (0, 1)],
        [
            {name: {"question_id": n, "l2_category": "geometry", "score": 1.0} for name in ("math", "average")}
            for n in (0, 1)
        ],
        ["A", "B"],
    ),
    "mme": (
        [{"question_id": "color/1.png", "question": f"Is {n}? Please answer yes or no.", **PLACE} for n in (0, 1)],
        [{"mme_perception_score": {"question_id": "color/1.png", "category": "color", "score": 1.0}}] * 2,
        ["Yes", "other"],
    ),
    "pope": (
        [
            {"id": n, "question_id": 1, "question": f"Is {n}?", "answer": "yes", "image_source": f"i{n}", "category": n}
            for n in ("random", "popular")
        ],
        [{"pope_accuracy": {"question_id": 1, "score": 1.0, "prediction": "no", "ground_truth": "yes"}}] * 2,
        ["Yes", "no"],
    ),
    "gqa": (
        [{"id": f"0{n}", "question": f"What {n}?", "answer": "a"} for n in (5, 3)],
        [{"exact_match": 1}] * 2,
        ["A", "b"],
    ),
    "textvqa": (
        [{"question_id": n, "image_id": "x", "question": f"what {n}?", "answers": ["c"] * 10} for n in (7, 8)],
        [{"exact_match": 1.0, "submission": {"question_id": n, "answer": "c"}} for n in (7, 8)],
        ["C", "b"],
    ),
    "mmmu": (
        [
            {"id": f"validation_Art_{n}", "question": "Is <image 1> x?", "options": "['u', 'v']", "answer": "B"}
            for n in (1, 2)
        ],
        [
            {"mmmu_acc": {"id": f"validation_Art_{n}", "subdomain": "Art", "answer": "B", "parsed_pred": ["A"]}}
            for n in (1, 2)
        ],
        ["(B)", "A"],
    ),
    "ocrbench": (
        [{"dataset": "d", "question": f"? {n}", "question_type": "Doc-oriented VQA", "answer": ["a"]} for n in (0, 1)],
        [{"ocrbench_accuracy": {"question_type": "Doc-oriented VQA", "score": 1, "ground_truth": ["a"]}}] * 2,
        ["A", "b"],
    ),
}


def saved(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def logs(name: str, old: bool) -> list[dict[str, Any]]:
    published, metrics, answers = LOGS[name]
    rows = []
    for number, (question, metric, answer) in enumerate(zip(published, metrics, answers, strict=True)):
        prompt = question["question"].replace(" Please answer yes or no.", "").replace("<image 1>", "<image>") + SHORT
        said = {"doc_id": number, "target": "?", "filtered_resps": [answer] if old else answer, **metric}
        kept = {column: cell for column, cell in question.items() if "image" not in column}
        asked = {"doc": kept, "arguments": [prompt, {"until": ["\n"]}]} if old else {"input": prompt}
        rows.append(said | asked | {"doc_hash": "0", "resps": [[answer]]})
    return rows


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("name", LOGS)
def test_a_sample_log_with_its_data(tmp_path: Path, name: str, old: bool) -> None:
    data = saved(tmp_path / "data.jsonl", LOGS[name][0])
    score = score_file(BENCHMARKS[name](), saved(tmp_path / "s.jsonl", logs(name, old)), data, False, None)
    assert list(score.per_sample.values()) == [True, False]
    # In another order, as of several processes.
    score = score_file(BENCHMARKS[name](), saved(tmp_path / "s.jsonl", logs(name, old)[::-1]), data, False, None)
    assert list(score.per_sample.values()) == [True, False]


@pytest.mark.parametrize("name", ["mmbench", "ocrbench"])
def test_a_sample_log_that_holds_its_gold(tmp_path: Path, name: str) -> None:
    score = score_file(BENCHMARKS[name](), saved(tmp_path / "s.jsonl", logs(name, False)), None, False, None)
    assert list(score.per_sample.values()) == [True, False]


@pytest.mark.parametrize("name", ["gqa", "textvqa", "mme", "pope"])
def test_a_sample_log_without_gold_asks_for_data(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="lacks the columns .* with --data"):
        score_file(BENCHMARKS[name](), saved(tmp_path / "s.jsonl", logs(name, False)), None, False, None)


@pytest.mark.parametrize("name", ["gqa", "ocrbench"])
def test_numbers_of_another_file_are_not_taken(tmp_path: Path, name: str) -> None:
    data = saved(tmp_path / "data.jsonl", LOGS[name][0][::-1])
    with pytest.raises(UserError, match="2 questions are not the ones that the benchmark file, of 2, has"):
        score_file(BENCHMARKS[name](), saved(tmp_path / "s.jsonl", logs(name, False)), data, False, None)
