import json
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks import BENCHMARKS
from eval.sample import as_list
from eval.score import score_file

YES_NO = {"question": "Is it?", "answer": "Yes", "prediction": "Yes"}
CHOICE = {"question": "Which?", "A": "cat", "B": "dog", "answer": "B", "prediction": "B"}
ANSWERS = ("prediction", "predict", "model_prediction")
LISTED = {"question": "Which?", "choices": ["cat", "dog"], "prediction": "B"}
# For each benchmark rows of one public form, with an answer each, of which the first alone is right.
FORMS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "mmbench": (
        "mmbench",
        [{"index": 1, **CHOICE}, {"index": 1000001, **CHOICE}, {"index": 2, **CHOICE, "answer": "A", "B": ""}],
    ),
    "mmstar": (
        "mmstar",
        [{"index": n, **CHOICE, "answer": "BA"[n], "category": "x", "l2_category": "y"} for n in (0, 1)],
    ),
    "mme of VLMEvalKit": (
        "mme",
        [
            {"index": 0, **YES_NO, "category": "color", "image_path": "color/1.png"},
            {"index": 1, **YES_NO, "question": "Or?", "answer": "No", "category": "color", "image_path": "color/1.png"},
        ],
    ),
    "mme of Hugging Face": (
        "mme",
        [
            {"question_id": "color/1.png", **YES_NO, "category": "color"},
            {"question_id": "color/1.png", **YES_NO, "question": "Or?", "answer": "No", "category": "color"},
        ],
    ),
    "pope of VLMEvalKit": (
        "pope",
        [{"index": n, **YES_NO, "answer": ["Yes", "No"][n], "category": "x"} for n in (0, 1)],
    ),
    "pope of Hugging Face": (
        "pope",
        [
            {"question_id": 1, **YES_NO, "image_source": f"C_{n}", "answer": ["yes", "no"][n], "category": "x"}
            for n in (0, 1)
        ],
    ),
    "gqa": ("gqa", [{"id": f"0{n}", "question": "?", "answer": "ab"[n], "prediction": "A."} for n in (0, 1)]),
    "textvqa of VLMEvalKit": (
        "textvqa",
        [{"index": n, "question": "?", "answer": ["['a'] * 2", "['b', 'b']"][n], "prediction": "b"} for n in (1, 0)],
    ),
    "textvqa": (
        "textvqa",
        [{"question_id": n, "question": "?", "answers": ["cd"[n]] * 10, "prediction": "C"} for n in (0, 1)],
    ),
    "mmmu": (
        "mmmu",
        [
            {"id": "validation_Art_1", "options": "['x', 'y']", "answer": "B", "question": "?", "prediction": "B"},
            {"id": "validation_Art_2", "options": "[]", "answer": "7", "question": "?", "prediction": "8"},
        ],
    ),
    "mmmu of VLMEvalKit": ("mmmu", [{"index": n, **CHOICE, "answer": "BA"[n], "category": "Art"} for n in (0, 1)]),
    "mathvista": (
        "mathvista",
        [
            {
                **{"pid": str(n), "question": "?", "question_type": "free_form", "answer_type": "integer"},
                **{"answer": str(n), "prediction": "1", "metadata": {"task": "vqa", "skills": ["logic"]}},
            }
            for n in (1, 2)
        ],
    ),
    "ocrbench": (
        "ocrbench",
        [
            {
                "dataset_name": f"d{n}",
                "id": 0,
                "type": "Doc-oriented VQA",
                "question": "?",
                "answers": "ab"[n],
                "predict": "A",
            }
            for n in (0, 1)
        ],
    ),
    "ocrbench of VLMEvalKit": (
        "ocrbench",
        [
            {"index": n, "category": "Doc-oriented VQA", "question": "?", "answer": f"['{'ab'[n]}']", "prediction": "A"}
            for n in (0, 1)
        ],
    ),
    "scienceqa of Hugging Face": ("scienceqa", [{**LISTED, "hint": "", "answer": 1 - n} for n in (0, 1)]),
    "scienceqa of VLMEvalKit": ("scienceqa", [{"index": n, **CHOICE, "answer": "BA"[n], "hint": ""} for n in (0, 1)]),
    "seedimage of Hugging Face": (
        "seedimage",
        [
            {
                **{"question_id": f"10{n}", "question": "Which?", "answer": "AB"[n], "prediction": "A. cat"},
                **{"choice_a": "cat", "choice_b": "dog", "choice_c": "3", "choice_d": "4"},
                **{"question_type_id": 2, "data_type": "image"},
            }
            for n in (0, 1)
        ],
    ),
    "seedimage of VLMEvalKit": ("seedimage", [{"index": n, **CHOICE, "answer": "BA"[n]} for n in (0, 1)]),
    "ai2d of Hugging Face": (
        "ai2d",
        [{"question": "?", "options": ["x", "y"], "answer": f"{1 - n}", "prediction": "B."} for n in (0, 1)],
    ),
    "ai2d of VLMEvalKit": ("ai2d", [{"index": n, **CHOICE, "answer": "BA"[n]} for n in (0, 1)]),
    "vqav2": (
        "vqav2",
        [
            {
                **{"question_id": n, "image_id": 1, "question": "?", "answer_type": "other", "prediction": "a C."},
                "answers": [{"answer": "cd"[n], "answer_id": number} for number in range(10)],
            }
            for n in (0, 1)
        ],
    ),
    "vizwiz": (
        "vizwiz",
        [
            {
                **{"image": f"VizWiz_val_0000000{n}.jpg", "question": "?", "answer_type": "other", "prediction": "C"},
                **{"answers": [{"answer": "cd"[n], "answer_confidence": "yes"}] * 10, "answerable": 1},
            }
            for n in (0, 1)
        ],
    ),
    "vizwiz of Hugging Face": (
        "vizwiz",
        [
            {"question_id": f"VizWiz_val_{n}", "question": "?", "answers": ["cd"[n]] * 10, "prediction": "c"}
            for n in (0, 1)
        ],
    ),
    "vizwiz of VLMEvalKit": (
        "vizwiz",
        [{"index": n, "question": "?", "answers": str(["cd"[n]] * 10), "prediction": "c"} for n in (0, 1)],
    ),
    "chartqa": ("chartqa", [{"imgname": "1.png", "query": "?", "label": "12"[n], "prediction": "1"} for n in (0, 1)]),
    "chartqa of Hugging Face": (
        "chartqa",
        [{"type": "human_test", "question": "?", "answer": "ab"[n], "prediction": "A"} for n in (0, 1)],
    ),
    "docvqa": (
        "docvqa",
        [
            {"questionId": n, "question": "?", "answers": ["ab"[n]], "question_types": ["form"], "prediction": "A"}
            for n in (0, 1)
        ],
    ),
    "docvqa of VLMEvalKit": (
        "docvqa",
        [{"index": n, "question": "?", "answer": str(["ab"[n]] * 2), "prediction": "a"} for n in (0, 1)],
    ),
    "hallusionbench": (
        "hallusionbench",
        [
            {
                **{"category": "VD", "subcategory": "figure", "visual_input": "1", "set_id": "0", "figure_id": "0"},
                **{"question_id": str(n), "question": "Is it?", "gt_answer": "10"[n], "model_prediction": "Yes."},
            }
            for n in (0, 1)
        ],
    ),
    "hallusionbench of VLMEvalKit": (
        "hallusionbench",
        [
            {
                **{"index": f"hallusionbench_VS_map_1_2_{n}", "category": "VS", "l2-category": "map", **YES_NO},
                "answer": ["Yes", "No"][n],
            }
            for n in (0, 1)
        ],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_run_of_a_form_scores_like_the_form(tmp_path: Path, form: str) -> None:
    name, rows = FORMS[form]
    benchmark = BENCHMARKS[name]()
    path = tmp_path / "published.json"
    path.write_text(json.dumps(rows))
    score = score_file(benchmark, path, None, False, None)
    assert list(score.per_sample.values()) == [True, False] or score.per_sample == {1: 1 / 3, 0: 0.0}
    samples = benchmark.samples(benchmark.normalise(benchmark.read_predictions(path)))
    answers = benchmark.predictions(benchmark.read_predictions(path), "", samples)
    lines = [{**s.fields, "index": s.id, "prompt": "?", "prediction": answers[s.id]} for s in samples]
    own = tmp_path / "answers.jsonl"
    own.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = score_file(benchmark, own, None, False, None)
    assert (again.scores, again.per_sample) == (score.scores, score.per_sample)
    assert len(benchmark.prompts(samples)) == len(samples)
    # The same answers, by id alone, against the published file.
    (tmp_path / "predictions.json").write_text(json.dumps({str(id_): text for id_, text in answers.items()}))
    whole = score_file(benchmark, tmp_path / "predictions.json", path, False, None)
    assert whole.per_sample == score.per_sample


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        ("['a', \"b\"]", ["a", "b"]),
        ("[]", []),
        ("", []),
        (["a"], ["a"]),
        ("[1]", ["[1]"]),
        ("[x", ["[x"]),
        ("a", ["a"]),
    ],
)
def test_written_lists_hold_texts(cell: object, items: list[str]) -> None:
    assert as_list(cell) == items


@pytest.mark.parametrize("form", FORMS)
def test_a_benchmark_file_is_no_prediction_file(tmp_path: Path, form: str) -> None:
    name, rows = FORMS[form]
    path = tmp_path / "published.json"
    path.write_text(json.dumps([{k: v for k, v in row.items() if k not in ANSWERS} for row in rows]))
    with pytest.raises(ValueError, match="expected the answers in a column|either gold answers or the model's"):
        score_file(BENCHMARKS[name](), path, None, False, None)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_refuses_a_foreign_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps([{"title": "x", "prediction": "y"}]))
    with pytest.raises(ValueError, match="lacks the columns|has no id|OCRBench"):
        score_file(BENCHMARKS[name](), path, None, False, None)
