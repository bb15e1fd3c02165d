import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from eval.benchmarks.mmmu import MMMU, choose, is_right_open, key_statements, named_images
from eval.reading.images import ImageSource
from eval.score import score_file
from eval.scoring.mmmu_peers import is_right_vlmevalkit, lmms_eval_letter
from llava_skip_base.errors import UserError

CHOICES = {"A": "a red car", "B": "a blue boat", "C": "two dogs"}


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        *[(text, "B") for text in ("B", "B.", "(B)", "The answer is B", "A is wrong, so B", "(A) or rather (B)")],
        ("A B C", "C"),
        ("I think that it shows two dogs here", "C"),
        ("two dogs", None),  # text counts only in answers of more than five words
        ("not two dogs but a blue boat", "B"),
        *[(text, None) for text in ("", "b", "B: boat", "Banana")],
        ("**B**", None),
    ],
)
def test_multiple_choice_parse(response: str, letter: str | None) -> None:
    assert choose(response, CHOICES) == letter


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        ("3.14", ["3.14"], True),
        ("The value is 3.141", ["3.14"], True),
        ("x = 1,000", ["1000"], True),
        ("It is 5 or 6", ["6"], True),
        ("It is 16", ["6"], False),
        ("the Eiffel Tower.", ["eiffel tower"], True),
        ("B", ["b"], True),
        ("cab", ["b"], False),
        ("So the answer is a cab b", ["b"], True),
        ("first it is 4\nthen nothing", ["4"], True),
        ("", ["4"], False),
        ("nan", ["nan"], False),
    ],
)
def test_open_questions(response: str, gold: list[str], right: bool) -> None:
    assert is_right_open(response, gold) is right


def test_key_statements_take_the_shortest_tail() -> None:
    assert key_statements("We see it.\nThus the final answer is 5.") == ["5"]
    assert key_statements("Nothing to say") == ["nothing to say"]
    assert key_statements("x = 3\ny = 4") == ["4"]  # an equation counts in the last line only


def output_rows() -> list[dict[str, Any]]:
    kinds = [("Math_1", "B", "B"), ("Math_2", "A", "no idea"), ("Art_1", "C", "(C)"), ("Art_2", "A", "?")]
    rows = [
        {
            **{"id": f"validation_{name}", "question_type": "multiple-choice", "answer": gold, "response": said},
            **{"all_choices": list(CHOICES), "index2ans": CHOICES},
        }
        for name, gold, said in kinds
    ]
    return [
        *rows,
        {"id": "validation_Math_3", "question_type": "open", "answer": ["7", "seven"], "response": "It is 7"},
    ]


def test_output_json_alone_with_the_official_draws(tmp_path: Path) -> None:
    path = tmp_path / "output.json"
    path.write_text(json.dumps(output_rows()))
    score = score_file(MMMU(), path, None, False, None)
    rng = Random(42)  # subjects in alphabetical order: Art_2 draws before Math_2
    hits = 3 + (rng.choice("ABC") == "A") + (rng.choice("ABC") == "A")
    assert score.counts["drawn_at_random"] == 2
    assert score.score == pytest.approx(100 * hits / 5)
    assert score.scores["Overall"] == {"num": 5, "acc": round(hits / 5, 3)}
    assert score.scores["Overall-Science"]["num"] == score.scores["Math"]["num"] == 3
    assert list(score.scores) == ["Overall-Art and Design", "Art", "Overall-Science", "Math", "Overall"]


def test_folder_of_output_files(tmp_path: Path) -> None:
    for subject in ("Math", "Art"):
        (tmp_path / subject).mkdir()
        rows = [row for row in output_rows() if subject in row["id"]]
        (tmp_path / subject / "output.json").write_text(json.dumps(rows))
    assert score_file(MMMU(), tmp_path, None, False, None).counts["questions"] == 5


def test_letters_against_the_answer_file(tmp_path: Path) -> None:
    gold = {row["id"]: {"question_type": row["question_type"], "ground_truth": row["answer"]} for row in output_rows()}
    (tmp_path / "answer_dict_val.json").write_text(json.dumps(gold))
    said = {row["id"]: letter for row, letter in zip(output_rows(), ["B", "B", "(C)", "A", "about seven"], strict=True)}
    (tmp_path / "val.json").write_text(json.dumps(said))
    score = score_file(MMMU(), tmp_path / "val.json", tmp_path / "answer_dict_val.json", False, None)
    assert score.counts["hits"] == 3  # "(C)" is no bare letter, as in the official evaluator
    assert "4 (validation_Math_1, validation_Math_2, validation_Art_1, validation_Art_2) questions" in score.notes[0]
    samples = MMMU().load(tmp_path / "answer_dict_val.json", with_images=False)
    with pytest.raises(UserError, match="no questions"):
        MMMU().prompts(samples)


@pytest.mark.parametrize(("rule", "hits"), [("official", 2), ("vlmevalkit", 3)])
def test_vlmevalkit_file(write_tsv: Callable[..., Path], rule: str, hits: int) -> None:
    rows = [
        {"index": 0, "id": "validation_Art_1", "A": "cat", "B": "dog", "answer": "B", "prediction": "B"},
        {"index": 1, "id": "validation_Art_2", "A": "cat", "B": "dog", "answer": "A", "prediction": "it is cat"},
        {"index": 2, "id": "validation_Math_1", "A": "", "B": "", "answer": "12.5", "prediction": "12.50"},
    ]
    rows = [{"question": "?", "split": "validation", "category": "x", **row} for row in rows]
    rows.append({**rows[0], "index": 3, "id": "dev_Art_1", "split": "dev"})
    score = score_file(MMMU(rule), write_tsv(rows), None, False, None)
    if rule == "official":  # "it is cat" has too few words, so a letter is drawn
        hits += Random(42).choice("AB") == "A"
    assert score.counts["hits"] == hits + (rule == "vlmevalkit")  # which reports the splits apart
    assert score.score == pytest.approx(100 * hits / 3)


@pytest.mark.parametrize(
    ("gold", "prediction", "right"),
    [
        ("A", "A", True),
        ("B", "B", True),  # the letter of "Other Answers", and the gold letter
        ("B", "A", False),  # the letter of the gold answer, which is not the gold letter
        ("C", "C", False),  # C is no letter of two options, so its text means A
        ("Z", "no idea", True),  # the letter of no choice
        ("b", "it is b", True),
        ("7", "7", True),
        ("AB", "AB", True),
        ("NA", "NA", False),  # a gold answer that pandas loses
        ("none", "none", True),
        ("API", "Failed to obtain answer via API", True),
        ("seven", "Failed to obtain answer via API", False),
    ],
)
def test_vlmevalkits_open_questions(gold: str, prediction: str, right: bool) -> None:
    fields = {"answer_cell": gold, "options": {}, "question_type": "open"}
    assert is_right_vlmevalkit(prediction, fields) is right


@pytest.mark.parametrize("word", ["NA", "N/A", "null", "NULL", "nan", "NaN", "None", "n/a", "<NA>"])
def test_vlmevalkit_loses_options_that_pandas_reads_as_missing(write_tsv: Callable[..., Path], word: str) -> None:
    row = {"question": "?", "A": "cat", "B": word, "C": "dog", "D": "", "answer": "B", "prediction": "B"}
    rows = [
        {"index": 0, "id": "validation_Art_1", **row},
        {"index": 1, "id": "validation_Art_2", **row, "answer": "A", "prediction": "A or B"},
        # Without an option A the question becomes an open one, whose A is the gold answer.
        {"index": 2, "id": "validation_Art_3", **row, "A": word, "B": "cat", "answer": "C", "prediction": "C"},
        {"index": 3, "id": "validation_Art_4", **row, "A": word, "B": "cat", "answer": "C", "prediction": "A"},
    ]
    score = score_file(MMMU("vlmevalkit"), write_tsv(rows), None, False, None)
    assert list(score.per_sample.values()) == [False, True, True, False]


def test_vlmevalkit_keeps_a_small_none(write_tsv: Callable[..., Path]) -> None:
    rows = [{"index": 0, "question": "?", "A": "cat", "B": "none", "answer": "B", "prediction": "none"}]
    assert score_file(MMMU("vlmevalkit"), write_tsv(rows), None, False, None).score == 100
    rows[0]["prediction"] = "None"  # pandas reads it as missing, and VLMEvalKit as "nan"
    assert score_file(MMMU("vlmevalkit"), write_tsv(rows), None, False, None).score == 0


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("(A) or rather (B)", "B"),
        ("A B", "B"),
        ("made in USA (B)", "B"),
        ("made in USA or so", "A"),  # a word that ends in the letter
        ("It is B. So", "B"),
        ("It is B.", "B"),
        ("A. or B. so", "A"),  # of several without the letter alone, the first
        ("B: boat", None),
        ("I think that it shows two dogs here", "C"),
        ("two dogs", None),
        *[(text, None) for text in ("", "b", "**B**")],
    ],
)
def test_lmms_evals_letter(response: str, letter: str | None) -> None:
    assert lmms_eval_letter(response, CHOICES) == letter


@pytest.mark.parametrize(("rule", "open_hits"), [("lmms-eval", 1), ("lmms-eval-0.7.2", 0)])
def test_lmms_evals_rule(write_tsv: Callable[..., Path], rule: str, open_hits: int) -> None:
    rows = [
        {"index": 0, "id": "validation_Math_1", "options": "['cat', 'dog']", "answer": "A", "prediction": "a USA dog"},
        {"index": 1, "id": "validation_Math_2", "options": "['cat', 'dog']", "answer": "B", "prediction": "what"},
        {"index": 2, "id": "validation_Art_1", "options": "[]", "answer": "7", "prediction": "It is 7"},
        # A written list is one reference, which no answer holds.
        {"index": 3, "id": "validation_Art_2", "options": "[]", "answer": "['7', 'seven']", "prediction": "It is 7"},
    ]
    score = score_file(MMMU(rule), write_tsv([{"question": "?", **row} for row in rows]), None, False, None)
    drawn = Random(0).choice("AB") == "B"
    assert list(score.per_sample.values()) == [True, drawn, bool(open_hits), False]
    assert score.scores["Overall"] == {"num": 4, "acc": round((1 + drawn + open_hits) / 4, 5)}
    assert score.counts["drawn_at_random"] == 1
    assert any("lmms-eval, whose draws depend" in note for note in score.notes)
    assert any("every open question as wrong" in note for note in score.notes) is (not open_hits)


def test_first_of_several_images(write_tsv: Callable[..., Path], encoded_image: Callable[..., str]) -> None:
    cells = [f"['{encoded_image((9, 8, 7))}', '{encoded_image()}']", encoded_image((1, 2, 3))]
    rows = [
        {"index": n, "question": "?", "A": "x", "B": "y", "answer": "A", "image": cell} for n, cell in enumerate(cells)
    ]
    samples = MMMU().load(write_tsv(rows))
    assert [sample.images[0].open().getpixel((0, 0)) for sample in samples] == [(9, 8, 7), (1, 2, 3)]


def test_lmms_eval_shows_all_images_that_are_named(
    write_tsv: Callable[..., Path], encoded_image: Callable[..., str]
) -> None:
    several = f"['{encoded_image((1, 0, 0))}', '{encoded_image((2, 0, 0))}', '{encoded_image((3, 0, 0))}']"
    rows = [
        {"index": 0, "question": "Is <image 1> it?", "A": "<image 3>", "B": "no", "answer": "A", "image": several},
        {"index": 1, "question": "How many?", "answer": "4", "image": several},
    ]
    benchmark = MMMU(protocol="lmms-eval")
    samples = benchmark.load(write_tsv(rows))
    assert [[p.open().getpixel((0, 0))[0] for p in sample.images] for sample in samples] == [[1, 3], [1]]
    assert benchmark.max_new_tokens == 128 and MMMU().max_new_tokens == 1024
    assert benchmark.prompts(samples) == [
        "Is <image 1> it?\nA. <image 3>\nB. no\n\nAnswer with the option's letter from the given choices directly.",
        "How many?\n\nAnswer the question using a single word or phrase.",
    ]
    parquet = {"question": "<image 2>?", "options": {}, "image_2": {"bytes": b"second"}}
    assert [p.data for p in named_images(parquet, ImageSource("sample 2", b"first"))] == [b"second"]
    rows[1]["question"] = "How many in <image 1> and <image 4>?"
    with pytest.raises(UserError, match="sample 1: its image cannot be decoded .image 4 of 3"):
        benchmark.load(write_tsv(rows))


def test_prompts_and_submission(tmp_path: Path) -> None:
    rows = [
        {"id": "validation_Art_1", "question": "What in <image 1>?", "options": "['cat', 'dog']", "answer": "A"},
        {"id": "validation_Art_2", "question": "How many?", "options": "[]", "answer": "['4', 'four']"},
    ]
    samples = MMMU().samples(MMMU().normalise(rows))
    assert MMMU().prompts(samples) == [
        "What in <image 1>?\n(A) cat\n(B) dog\n\nAnswer with the option's letter from the given choices directly.",
        "How many?\nAnswer the question using a single word or phrase.",
    ]
    answers = {"validation_Art_1": "It is (B).", "validation_Art_2": "about four"}
    score = MMMU().score(samples, answers)
    assert score.counts["hits"] == 1
    MMMU().write_submission(samples, answers, tmp_path / "sent.json")
    assert json.loads((tmp_path / "sent.json").read_text()) == {**answers, "validation_Art_1": "B"}
