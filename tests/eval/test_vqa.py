import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks.gqa import GQA
from eval.benchmarks.ocrbench import OTHERS, RECOGNITION, OCRBench, is_hit
from eval.benchmarks.textvqa import TextVQA, asked_question
from eval.score import score_file
from eval.scoring.vqa import normalise_answer, soft_accuracy, vlmevalkit_form, yes_or_no
from llava_skip_base.errors import UserError

INSTRUCTION = "\nAnswer the question using a single word or phrase."


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Answer.", "answer"),
        ("two dogs, one cat?", "2 dogs 1 cat"),
        ("dont know", "don't know"),
        ("the dog's", "dog 's"),
        ("3.50", "3.50"),
        ("end. of 5.", "end of 5"),
        ("a-b", "b"),  # the hyphen becomes a space, which leaves "a" as an article
        ("x - y", "x y"),
        ("coca\ncola\tzero", "coca cola 0"),
        (". " * 33 + "x", ". x"),  # the original removes 32 periods and no more
        ("", ""),
    ],
)
def test_vqa_normalisation(text: str, plain: str) -> None:
    assert normalise_answer(text) == plain


@pytest.mark.parametrize(
    ("text", "official", "peer"),
    [
        ("5.", "5", "5."),
        ("no. 5.", "no 5", "no 5."),
        ("x.5", "x.5", "x.5"),
        ("x. 5", "x 5", "x 5"),
        ("5.x", "5x", "5.x"),
        ("1,,2", "12", "1 2"),
        ("1,2", "12", "12"),
        ("x/y 1,2", "x y 12", "xy 12"),  # one comma between digits: all marks go
        ("x/y 1,,2", "x y 12", "x y 1 2"),
        ("(3)", "3", "3"),
    ],
)
def test_periods_and_commas_between_digits(text: str, official: str, peer: str) -> None:
    assert (normalise_answer(text), vlmevalkit_form(text)) == (official, peer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("yes/x 1,2", None),  # one comma between digits: the stroke goes
        ("yes/x 1,,2", "yes"),
        ("Yes.", "yes"),
        ("The answer is no", "no"),
        ("yes or no", None),
        ("nothing", None),
        ("YES,sir", "yes"),
        ("", None),
    ],
)
def test_yes_or_no_as_words(text: str, answer: str | None) -> None:
    assert yes_or_no(text) == answer


@pytest.mark.parametrize(("given", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy_leaves_each_annotator_out(given: int, score: float) -> None:
    references = ["Nokia"] * given + [f"other {n}" for n in range(10 - given)]
    assert soft_accuracy("nokia.", references) == pytest.approx(score)


@pytest.fixture
def textvqa(tmp_path: Path) -> Path:
    folder = tmp_path / "textvqa"
    folder.mkdir()
    data = [
        {
            "question_id": 34602,
            "image_id": "003a8ae2ef43b901",
            "question": "What is the Brand?",
            "answers": ["nokia"] * 10,
        },
        {
            "question_id": 34603,
            "image_id": "003a8ae2ef43b901",
            "question": "which year?",
            "answers": ["2008"] * 2 + ["8"] * 8,
        },
    ]
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"dataset_type": "val", "data": data}))
    questions = [
        {"question_id": "003a8ae2ef43b901", "text": f"{row['question']}\nReference OCR token: NOKIA, 2008{INSTRUCTION}"}
        for row in data
    ]
    write_json_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", questions)
    return folder


@pytest.mark.parametrize("whole_folder", [True, False])
def test_llava_answers_that_share_an_image_id(textvqa: Path, tmp_path: Path, whole_folder: bool) -> None:
    rows = [
        {
            "question_id": "003a8ae2ef43b901",
            "prompt": f"which year?\nReference OCR token: 1{INSTRUCTION}",
            "text": "2008",
        },
        {"question_id": "003a8ae2ef43b901", "prompt": f"what is the brand?{INSTRUCTION}", "text": "Nokia"},
    ]
    data = textvqa if whole_folder else textvqa / "TextVQA_0.5.1_val.json"
    score = score_file(TextVQA(), write_json_lines(tmp_path / "a.jsonl", rows), data, False, None)
    assert score.score == pytest.approx(100 * (1 + 0.6) / 2)
    with pytest.raises(UserError, match="questions are answered more than once: 1 .003a8ae2ef43b901: which year"):
        score_file(TextVQA(), write_json_lines(tmp_path / "a.jsonl", [*rows, rows[0]]), data, False, None)
    with pytest.raises(UserError, match=r"1 \(34602\) of 2 predictions are missing"):
        score_file(TextVQA(), write_json_lines(tmp_path / "a.jsonl", rows[:1]), data, False, None)


def test_textvqa_ids_and_lists_in_text(write_tsv: Callable[..., Path]) -> None:
    rows = [{"index": 1, "question": "?", "answer": "['a cat', 'cat', 'cats', 'dog']", "prediction": "the cat"}]
    assert score_file(TextVQA(), write_tsv(rows), None, False, None).score == pytest.approx(
        100 * (1 / 3 * 2 + 2 / 3 * 2) / 4
    )


def test_textvqa_prompt_with_and_without_ocr_line(textvqa: Path) -> None:
    samples = TextVQA().load(textvqa, with_images=False)
    assert TextVQA().prompts(samples)[0] == "What is the Brand?\nReference OCR token: NOKIA, 2008" + INSTRUCTION
    assert TextVQA().protocol(samples) == "llava"
    assert TextVQA(protocol="llava-without-ocr").prompts(samples)[0] == "What is the Brand?" + INSTRUCTION
    samples = TextVQA().load(textvqa / "TextVQA_0.5.1_val.json", with_images=False)
    assert TextVQA().prompts(samples)[0] == "What is the Brand?" + INSTRUCTION
    assert TextVQA().protocol(samples) == "llava-without-ocr"


@pytest.mark.parametrize(
    "prompt",
    [
        f"What?{INSTRUCTION}",
        f"What?\nReference OCR token: a, b{INSTRUCTION}",
        f"Reference OCR token: a, b\nWhat?{INSTRUCTION}",
        "OCR tokens: a, b. Question: What? Short answer:",
    ],
)
def test_question_of_a_prompt(prompt: str) -> None:
    assert asked_question(prompt) == "What?"


@pytest.fixture
def gqa(tmp_path: Path) -> Path:
    folder = tmp_path / "gqa"
    (folder / "data").mkdir(parents=True)
    kinds = [("query", "attr", "red"), ("verify", "obj", "yes"), ("query", "rel", "dog")]
    questions = {
        f"0{n}": {
            **{"question": "?", "imageId": "n1", "answer": answer, "isBalanced": n < 2},
            "types": {"structural": structural, "semantic": semantic},
        }
        for n, (structural, semantic, answer) in enumerate(kinds)
    }
    (folder / "data" / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    return folder


def test_gqa_by_hand(gqa: Path, tmp_path: Path) -> None:
    rows = [{"question_id": f"0{n}", "text": text} for n, text in enumerate(["Red.", "no", "dog"])]
    predictions = write_json_lines(tmp_path / "merge.jsonl", rows)
    score = score_file(GQA(), predictions, gqa, False, None, tmp_path / "sent.json")
    assert score.scores == {
        **{"accuracy": 50.0, "open": 100.0, "binary": 0.0, "structural/query": 100.0, "semantic/attr": 100.0},
        **{"structural/verify": 0.0, "semantic/obj": 0.0},
    }
    assert score.counts["not_balanced"] == 1
    # The file for GQA's evaluator gives the same score.
    assert json.loads((tmp_path / "sent.json").read_text())[0] == {"questionId": "00", "prediction": "red"}
    assert score_file(GQA(), tmp_path / "sent.json", gqa, False, None).score == 50.0


@pytest.mark.parametrize(("rule", "score"), [("official", 100.0), ("vlmevalkit", 0.0)])
def test_textvqa_rules_differ_in_the_first_steps(write_tsv: Callable[..., Path], rule: str, score: float) -> None:
    rows = [{"index": 5, "question": "?", "answer": str(["Joe 's"] * 10), "prediction": "Joe's"}]
    assert score_file(TextVQA(rule), write_tsv(rows), None, False, None).score == score


def test_gqa_takes_none_for_an_answer(write_tsv: Callable[..., Path]) -> None:
    rows = [
        {"index": n, "question": "?", "answer": "none", "prediction": text} for n, text in enumerate(["None.", "no"])
    ]
    assert score_file(GQA(), write_tsv(rows), None, False, None).score == 50.0


@pytest.mark.parametrize(
    ("rule", "score"), [("official", 0.0), ("vlmevalkit", 100 / 3), ("lmms-eval", pytest.approx(200 / 3))]
)
def test_gqa_rules_differ_in_spaces_and_marks(write_tsv: Callable[..., Path], rule: str, score: float) -> None:
    said = [("red", " Red"), ("t-shirt", "T shirt"), ("t-shirt", "tshirt!")]
    rows = [{"index": n, "question": "?", "answer": a, "prediction": text} for n, (a, text) in enumerate(said)]
    assert score_file(GQA(rule), write_tsv(rows), None, False, None).score == score


@pytest.mark.parametrize(("rule", "prediction", "score"), [("official", "None.", 100), ("vlmevalkit", "none", 100)])
@pytest.mark.parametrize("benchmark", [TextVQA, GQA])
def test_vlmevalkit_loses_answers_that_pandas_reads_as_missing(
    write_tsv: Callable[..., Path], benchmark: Any, rule: str, prediction: str, score: float
) -> None:
    gold = "none" if benchmark is GQA else str(["none"] * 10)
    row = {"index": 5, "question": "?", "answer": gold}
    for text, wanted in ((prediction, score), ("None", score * (rule == "official"))):
        predictions = write_tsv([{**row, "prediction": text}])
        assert score_file(benchmark(rule), predictions, None, False, None).score == wanted


@pytest.mark.parametrize(
    ("prediction", "references", "kind", "official", "folded"),
    [
        ("\uff28\uff25\uff2c\uff2c\uff2f\uff01", ["hello!"], 6, False, True),
        ("it is 12.5", ["\uff11\uff12\uff0e\uff15"], 6, False, True),
        ("a\u3000b", ["a b"], 7, False, True),
        ("\u2460", ["1"], 6, False, False),  # a digit in a circle is no full-width form
        ("\uff21+\uff22", ["A+B"], 9, False, False),  # formulas are not folded
        ("A + B", ["A+B"], 9, True, True),
    ],
)
def test_lmms_eval_folds_full_width_ascii(
    write_tsv: Callable[..., Path], prediction: str, references: list[str], kind: int, official: bool, folded: bool
) -> None:
    rows = [{"index": 0, "question": "?", "answer": str(references), "prediction": prediction}]
    rows[0]["category"] = (*RECOGNITION, *OTHERS)[kind]
    for rule, hit in (("official", official), ("lmms-eval", folded)):
        score = score_file(OCRBench(rule), write_tsv(rows), None, False, None)
        assert (score.scores["Final Score"], score.rule) == (hit, OCRBench.rules[rule])


@pytest.mark.parametrize(
    ("prediction", "fields", "hit"),
    [
        ("The word is HELLO\nthere", {"references": ["hello there"]}, True),
        ("hel lo", {"references": ["hello"]}, False),
        ("two", {"references": ["one", "Two"]}, True),
        ("a ^ {2} + B", {"references": ["a^{2}+B"], "dataset": "HME100k"}, True),
        ("a^{2}+b", {"references": ["a^{2}+B"], "dataset": "HME100k"}, False),
        ("x + Y", {"references": ["x+Y"], "type": "Handwritten Mathematical Expression Recognition"}, True),
        ("", {"references": ["1"]}, False),
    ],
)
def test_ocrbench_hits(prediction: str, fields: dict[str, Any], hit: bool) -> None:
    assert is_hit(prediction, {"dataset": "", "type": "Doc-oriented VQA", **fields}) is hit


def ocrbench_rows() -> list[dict[str, Any]]:
    kinds = ["Regular Text Recognition", "Digit String Recognition", "Doc-oriented VQA", "Key Information Extraction"]
    return [
        {
            **{"dataset_name": f"set{n // 2}", "type": kind, "id": n % 2, "image_path": "x.jpg", "question": "what?"},
            **{
                "answers": kind[:3] if n else [kind[:3]],
                "predict": f"it is {kind[:3]}" if n < 3 else "no",
                "result": 0,
            },
        }
        for n, kind in enumerate(kinds)
    ]


def test_ocrbench_json_whose_ids_repeat_between_data_sets(tmp_path: Path) -> None:
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(ocrbench_rows()))
    score = score_file(OCRBench(), path, None, False, None)
    assert (score.scores["Text Recognition"], score.scores["Doc-oriented VQA"]) == (2, 1)
    assert (score.scores["Final Score"], score.scores["Final Score Norm"], score.score) == (3, 0.3, 75.0)
    assert score.scores["kinds"]["Digit String Recognition"] == 1
    assert "OCRBench has 1000 questions, this file 4." in score.notes


def test_ocrbench_item_that_was_not_answered(tmp_path: Path) -> None:
    rows = ocrbench_rows()
    del rows[1]["predict"]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"1 \(set0/1\) of 4 predictions are missing"):
        score_file(OCRBench(), path, None, False, None)
    assert score_file(OCRBench(), path, None, True, None).scores["Final Score"] == 2


def test_ocrbench_of_vlmevalkit(write_tsv: Callable[..., Path]) -> None:
    rows = [
        {"index": n, "question": "?", "answer": "['12', 'x']", "category": "Scene Text-centric VQA", "prediction": said}
        for n, said in enumerate([12, "No X", "none"])
    ]
    assert score_file(OCRBench(), write_tsv(rows), None, False, None).scores["Scene Text-centric VQA"] == 2


@pytest.mark.parametrize(("protocol", "suffix"), [("skip-vision", INSTRUCTION), ("vlmevalkit", "")])
def test_ocrbench_prompts(protocol: str, suffix: str) -> None:
    benchmark = OCRBench(protocol=protocol)
    samples = benchmark.samples(benchmark.normalise(ocrbench_rows()))
    assert benchmark.prompts(samples)[0] == "what?" + suffix
