import json
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks.mathvista import (
    MathVista,
    extract,
    extraction_prompt,
    is_right,
    is_right_vlmevalkit,
    prefetch,
)
from eval.score import score_file
from eval.scoring.edits import edit_distance
from eval.scoring.judge import Judge
from llava_skip_base.errors import UserError

CHOICE = {"question_type": "multi_choice", "answer_type": "text", "choices": ["3/11", "8/11", "6"], "answer": "8/11"}
INTEGER = {"question_type": "free_form", "answer_type": "integer", "choices": [], "answer": "14"}
FLOAT = {"question_type": "free_form", "answer_type": "float", "precision": "1.0", "choices": [], "answer": "0.6"}
LIST = {"question_type": "free_form", "answer_type": "list", "choices": [], "answer": "[1, 2]"}


@pytest.mark.parametrize(
    ("extraction", "fields", "right"),
    [
        *[(text, CHOICE, True) for text in ("B", "(B)", "8/11", "(b) 8/11", "8/12")],
        *[(text, CHOICE, False) for text in ("A", "b", "", "Z")],  # "" is nearest to the shortest choice
        *[(text, INTEGER, True) for text in ("14", "14.9", " 14 ")],
        *[(text, INTEGER, False) for text in ("fourteen", "", "inf", "nan")],
        *[(text, FLOAT, True) for text in ("0.6", "0.64", "6e-1")],
        *[(text, FLOAT, False) for text in ("0.66", "60%", "")],
        ("[1, 2]", LIST, True),
        ("[1,2]", LIST, False),
    ],
)
def test_normalised_comparison(extraction: str, fields: dict[str, Any], right: bool) -> None:
    assert is_right(extraction, fields) is right


@pytest.mark.parametrize(
    ("response", "fields", "extracted"),
    [
        ("8/11", CHOICE, "8/11"),
        ("(B) 8/11", CHOICE, None),
        ("14", INTEGER, "14"),
        ("14.0", INTEGER, None),
        ("0.60", FLOAT, "0.6"),
        ('The answer is "B".', CHOICE, "B"),
        ("It is 14.", INTEGER, None),
        ("", INTEGER, ""),
    ],
)
def test_extraction_by_rule(response: str, fields: dict[str, Any], extracted: str | None) -> None:
    assert extract(response, fields) == extracted


@pytest.mark.parametrize(("first", "second", "count"), [("", "abc", 3), ("kitten", "sitting", 3), ("same", "same", 0)])
def test_edit_distance(first: str, second: str, count: int) -> None:
    assert edit_distance(first, second) == edit_distance(second, first) == count


@pytest.fixture
def testmini(tmp_path: Path) -> Path:
    metadata = {"language": "english", "task": "vqa", "skills": ["arithmetic", "logic"]}
    problems = {
        "1": {**CHOICE, "question": "Which?", "unit": None, "precision": None, "metadata": metadata},
        "2": {**INTEGER, "question": "How many?", "unit": "g", "metadata": {**metadata, "skills": ["logic"]}},
    }
    for pid, problem in problems.items():
        problem |= {"pid": pid, "image": f"images/{pid}.jpg", "choices": problem["choices"] or None}
    (tmp_path / "testmini.json").write_text(json.dumps(problems))
    return tmp_path / "testmini.json"


def test_extracted_file_alone(testmini: Path, tmp_path: Path) -> None:
    rows = json.loads(testmini.read_text())
    rows["1"] |= {"response": "It is (B)", "extraction": "B", "prediction": "8/11", "true_false": True}
    rows["2"] |= {"response": "13", "extraction": "13"}
    path = tmp_path / "out.json"
    path.write_text(json.dumps(rows))
    for data in (None, testmini):
        score = score_file(MathVista(), path, data, False, None)
        assert score.scores["average"] == {"accuracy": "50.0", "correct": 1, "total": 2}
        assert score.scores["skills"] == {
            "arithmetic": {"accuracy": "100.00", "correct": 1, "total": 1},
            "logic": {"accuracy": "50.00", "correct": 1, "total": 2},
        }
        assert score.scores["language"]["english"]["total"] == 2
        assert score.scores["question_type"]["free_form"]["accuracy"] == "0.00"


@pytest.mark.parametrize("logged", [True, False])
def test_results_of_lmms_eval(tmp_path: Path, logged: bool) -> None:
    rows: list[dict[str, Any]] = [
        {"question_id": str(n), "query": "Which?", **CHOICE, "precision": None, "extraction": "BA"[n], "skills": ["s"]}
        for n in (0, 1)
    ]
    said = {"target": "8/11", "input": "Which?", "filtered_resps": "It is (B)"}
    if logged:
        rows = [{"doc_id": n, **said, "llm_as_judge_eval": row, "submission": row} for n, row in enumerate(rows)]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(rows))
    score = score_file(MathVista(), path, None, False, None)
    assert score.scores["skills"] == {"s": {"accuracy": "50.00", "correct": 1, "total": 2}}


def test_responses_without_and_with_a_judge(testmini: Path, tmp_path: Path, judge_server: Any) -> None:
    path = tmp_path / "answers.json"
    path.write_text(json.dumps({"1": "It is the second, (B)", "2": "14"}))
    score = score_file(MathVista(), path, testmini, False, None)
    assert (score.scores["average"]["correct"], score.counts["not_extracted_by_rule"]) == (1, 1)
    assert "1 responses need a judge" in score.notes[0]
    server = judge_server(["B", 500])
    judge = Judge(server.url, tmp_path, "answers", "j", retries=0)
    score = score_file(MathVista(), path, testmini, False, judge)
    assert (score.scores["average"]["correct"], len(server.requests)) == (2, 1)
    assert score_file(MathVista(), path, testmini, False, judge).score == 100.0  # from what the judge said before
    path.write_text(json.dumps({"1": "It is the last", "2": "14"}))
    with pytest.raises(UserError, match="are of other answers"):
        score_file(MathVista(), path, testmini, False, judge)
    other = Judge(server.url, tmp_path / "new", "answers", "j", retries=0)
    assert score_file(MathVista(), path, testmini, False, other).status == "incomplete"


def test_prompts(testmini: Path) -> None:
    samples = MathVista().load(testmini, with_images=False)
    assert MathVista().prompts(samples) == [
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
        "Question: Which?\nChoices:\n(A) 3/11\n(B) 8/11\n(C) 6",
        "Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at "
        "the end.\nQuestion: How many? (Unit: g)",
    ]
    assert samples[0].fields["image_path"] == "images/1.jpg"
    (testmini.parent / "query.json").write_text(json.dumps({"1": "As released", "2": "So too"}))
    assert MathVista().prompts(MathVista().load(testmini.parent, with_images=False)) == ["As released", "So too"]
    prompt = extraction_prompt(samples[1].fields, "There are 14.")
    assert prompt.count("Extracted answer: ") == 6
    assert prompt.endswith("Model response: There are 14.\n\nExtracted answer: ")


@pytest.mark.parametrize(
    ("text", "fields", "taken", "right"),
    [
        ("It is (B)", CHOICE, "B", True),
        ("8/11 of it", CHOICE, "B", True),
        ("The answer is A", CHOICE, "A", False),
        ("none of them", CHOICE, None, False),
        ("", CHOICE, None, False),
        ("14", INTEGER, "14", True),
        ("14.0", INTEGER, None, False),
        ("15", INTEGER, None, False),
        ("0", {**INTEGER, "answer": "0"}, None, True),  # the judge is asked about a number 0
        ("0.60", FLOAT, "0.60", True),
        ("0.64", FLOAT, None, False),
        ("[1, 2]", LIST, None, False),
    ],
)
def test_vlmevalkits_rule(text: str, fields: dict[str, Any], taken: str | None, right: bool) -> None:
    assert prefetch(text, fields) == taken
    assert is_right_vlmevalkit(text, fields) is right


def test_vlmevalkits_file_before_and_after_its_judge(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"index": 1, **CHOICE, "answer_option": "B", "prediction": "I say (B)", "task": "vqa", "skills": "['s', 't']"},
        {"index": 2, **INTEGER, "prediction": "There are 14.", "task": "qa", "skills": "['t']"},
    ]
    for row in rows:
        row |= {"question": "?", "choices": str(row["choices"])}
    path = tmp_path / "p.json"
    path.write_text(json.dumps(rows))
    score = score_file(MathVista("vlmevalkit"), path, None, False, None)
    assert (score.score, score.counts["not_extracted_by_rule"]) == (50.0, 1)
    assert score.scores == {
        "Overall": {"tot": 2, "hit": 1, "acc": 50.0},
        "vqa": {"tot": 1, "hit": 1, "acc": 100.0},
        "qa": {"tot": 1, "hit": 0, "acc": 0.0},
        "s": {"tot": 1, "hit": 1, "acc": 100.0},
        "t": {"tot": 2, "hit": 1, "acc": 50.0},
    }
    path.write_text(json.dumps([{**row, "res": res, "log": "x"} for row, res in zip(rows, ("B", 14), strict=True)]))
    assert score_file(MathVista("vlmevalkit"), path, None, False, None).score == 100.0


def test_a_split_without_gold_is_refused(testmini: Path, tmp_path: Path) -> None:
    rows = json.loads(testmini.read_text())
    del rows["2"]["answer"]
    testmini.write_text(json.dumps(rows))
    (tmp_path / "p.json").write_text(json.dumps({"1": "A", "2": "3"}))
    with pytest.raises(UserError, match=r"1 \(2\) of 2 questions have no gold answer"):
        score_file(MathVista(), tmp_path / "p.json", testmini, False, None)
