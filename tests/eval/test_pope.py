import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks.pope import POPE, SPLITS, official_answer
from eval.score import score_file
from llava_skip_base.errors import UserError

INSTRUCTION = "\nAnswer the question using a single word or phrase."
OBJECTS = ("dog", "cat", "car", "cup")
# By split: gold and answer of each object. adversarial: tp 1, fp 1, fn 1, tn 1; popular all right; random says yes.
GOLD = ("yes", "no", "yes", "no")
SAID = {
    "adversarial": ("Yes", "Yes.", "No", "no"),
    "popular": ("Yes", "No", "yes, it is", "not here"),
    "random": ("Yes",) * 4,
}


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def label_rows(split: str) -> list[dict[str, Any]]:
    return [
        {"question_id": n + 1, "image": f"COCO_{split}.jpg", "text": f"Is there a {name} in the image?", "label": gold}
        for n, (name, gold) in enumerate(zip(OBJECTS, GOLD, strict=True))
    ]


@pytest.fixture
def llava_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pope"
    questions, answers = [], []
    for split in SPLITS:
        rows = label_rows(split)
        extra = [{**rows[0], "question_id": 99, "text": "Is there a tree in the image?"}] if split == "random" else []
        write_json_lines(folder / "coco" / f"coco_pope_{split}.json", [*extra, *rows])
        for row, said in zip(rows, SAID[split], strict=True):
            asked = {"question_id": len(questions), "image": row["image"], "category": split}
            questions.append({**asked, "text": row["text"] + INSTRUCTION})
            answers.append({"question_id": asked["question_id"], "prompt": row["text"] + INSTRUCTION, "text": said})
    write_json_lines(folder / "llava_pope_test.jsonl", questions)
    write_json_lines(folder / "answers" / "llava.jsonl", answers)
    return folder


def check(score: Any) -> None:
    assert score.scores["adversarial"] == {
        **{"f1": 0.5, "accuracy": 0.5, "precision": 0.5, "recall": 0.5, "yes_ratio": 0.5},
    }
    assert score.scores["popular"]["f1"] == 1.0
    assert score.scores["random"]["f1"] == pytest.approx(2 / 3)
    assert score.scores["random"]["yes_ratio"] == 1.0
    assert score.score == pytest.approx(100 * (0.5 + 1 + 2 / 3) / 3)


@pytest.mark.parametrize("place", [".", "coco", "llava_pope_test.jsonl"])
def test_llava_answers_are_paired_by_image_and_question(llava_folder: Path, place: str) -> None:
    # The label file of the random split has a row more than the questions, at its head: pairing by line would be wrong.
    check(score_file(POPE(), llava_folder / "answers" / "llava.jsonl", llava_folder / place, False, None))


def test_answers_line_by_line_only_if_every_question_agrees(llava_folder: Path) -> None:
    answers = [json.loads(line) for line in (llava_folder / "answers" / "llava.jsonl").read_text().splitlines()]
    data = llava_folder / "coco" / "coco_pope_adversarial.json"
    (llava_folder / "llava_pope_test.jsonl").unlink()
    rows = [{"question": answer["prompt"], "answer": answer["text"]} for answer in answers[:4]]
    path = write_json_lines(llava_folder / "own.json", rows)
    score = score_file(POPE(), path, data, False, None)
    assert score.scores["adversarial"]["f1"] == 0.5
    assert "splits in the file: adversarial" in score.notes[0]
    with pytest.raises(UserError, match="differ from the 4 labels' line by line"):
        score_file(POPE(), write_json_lines(path, rows[::-1]), data, False, None)


def test_vlmevalkit_file_with_joined_splits(write_tsv: Callable[..., Path]) -> None:
    rows = [
        {"index": 0, "question": "a dog?", "answer": "Yes", "category": "adversarial,popular", "prediction": "Yes."},
        {"index": 1, "question": "a cat?", "answer": "No", "category": "popular", "prediction": "maybe"},
    ]
    score = score_file(POPE("vlmevalkit"), write_tsv(rows), None, False, None)
    assert score.counts["splits"] == {"adversarial": 1, "popular": 2}
    assert score.scores["popular"]["accuracy"] == 0.5  # "maybe" is neither, so wrong, and no in F1
    assert score.scores["pooled"]["f1"] == 1.0
    assert score.counts["neither"] == 1


def test_lmms_evals_rule(write_tsv: Callable[..., Path]) -> None:
    said = [("Yes", "yes "), ("Yes", "No"), ("Yes", "Yes."), ("No", "YES"), ("No", "it is not")]
    rows = [
        {"index": n, "question": "?", "answer": gold, "category": "popular", "prediction": text}
        for n, (gold, text) in enumerate(said)
    ]
    score = score_file(POPE("lmms-eval"), write_tsv(rows), None, False, None)
    # tp 1, fp 1, fn 1: what is neither yes nor no counts only as wrong; the ratio is that of the gold answers.
    wanted = {"f1": 0.5, "accuracy": 0.2, "precision": 0.5, "recall": 0.5, "yes_ratio": 0.6}
    assert score.scores["pooled"] == score.scores["popular"] == wanted
    assert (score.score, score.counts["neither"]) == (50.0, 2)


def test_ids_of_other_questions_are_refused(llava_folder: Path) -> None:
    answers = [json.loads(line) for line in (llava_folder / "answers" / "llava.jsonl").read_text().splitlines()]
    answers[3]["prompt"] = "Is there a house in the image?" + INSTRUCTION
    path = write_json_lines(llava_folder / "answers" / "llava.jsonl", answers)
    with pytest.raises(UserError, match=r"1 \(3\) rows have the id of another question"):
        score_file(POPE(), path, llava_folder, False, None)


def test_questions_without_a_label_are_refused(llava_folder: Path) -> None:
    write_json_lines(llava_folder / "coco" / "coco_pope_random.json", label_rows("random")[1:])
    with pytest.raises(UserError, match=r"1 \(8\) of 12 questions have no label"):
        POPE().load(llava_folder, with_images=False)
    with pytest.raises(UserError, match="holds no label files"):
        POPE().load(llava_folder / "answers", with_images=False)


def release(folder: Path, numbers: tuple[int, int]) -> Path:
    """A question file and the label files of two releases: numbers of questions and of labels in the random split."""
    rows = [{"question_id": n, "image": f"{n}.jpg", "text": f"Is there a thing {n}?", "label": "no"} for n in range(99)]
    for split in SPLITS[:2]:
        write_json_lines(folder / f"coco_pope_{split}.json", rows)
    asked, labelled = ([{**rows[0], "image": f"{n}.jpg"} for n in range(number)] for number in numbers)
    write_json_lines(folder / "coco_pope_random.json", [{**row, "text": "Is it?"} for row in labelled])
    questions = [{**row, "category": split} for split in SPLITS[:2] for row in rows]
    questions += [{**row, "category": "random"} for row in asked]
    return write_json_lines(
        folder / "llava_pope_test.jsonl", [{**row, "question_id": n} for n, row in enumerate(questions)]
    )


@pytest.mark.parametrize(
    ("numbers", "labels", "asked"),
    [
        ((2910, 3000), "3000 in the random split: a later release", "2910 in the random split: the release that LLaVA"),
        ((3000, 2910), "2910 in the random split: the release that LLaVA", "3000 in the random split: a later release"),
        ((10, 12), "", ""),
    ],
)
def test_label_files_of_another_release(tmp_path: Path, numbers: tuple[int, int], labels: str, asked: str) -> None:
    release(tmp_path, numbers)
    with pytest.raises(
        UserError, match="questions have no label in .*: the label files are of another release"
    ) as info:
        POPE().load(tmp_path, with_images=False)
    message = str(info.value)
    assert labels in message and asked in message
    assert message.count("in the random split") == 2 * bool(labels)


def test_answers_of_another_release(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in release(tmp_path, (2910, 3000)).read_text().splitlines()]
    answers = [
        {"image": row["image"], "category": row["category"], "question": "Is it?", "answer": "no"} for row in rows
    ]
    (tmp_path / "llava_pope_test.jsonl").unlink()
    path = write_json_lines(tmp_path / "own" / "answers.jsonl", answers[198:])
    with pytest.raises(
        UserError, match="answers 2910 questions of the random split, and the labels are of another rel"
    ):
        score_file(POPE(), path, tmp_path / "coco_pope_random.json", True, None)
    path = write_json_lines(path, [{"question_id": n, "prompt": "Is it?", "text": "no"} for n in range(2910)])
    with pytest.raises(UserError, match="may be of another release .3000 in the random split: a later release"):
        score_file(POPE(), path, tmp_path / "coco_pope_random.json", False, None)


@pytest.mark.parametrize("place", ["llava_pope_test.jsonl", "coco/coco_pope_random.json"])
def test_questions_are_not_taken_for_answers(llava_folder: Path, place: str) -> None:
    with pytest.raises(UserError, match="is a file of questions"):
        score_file(POPE(), llava_folder / place, llava_folder, False, None)


def test_prompts(llava_folder: Path) -> None:
    samples = POPE().load(llava_folder, with_images=False)
    assert POPE().prompts(samples)[0] == "Is there a dog in the image?" + INSTRUCTION


@pytest.mark.parametrize(
    ("text", "answer"),
    [("No", "no"), ("no, there", "no"), ("There is not", "no"), ("NO", "yes"), ("garbage", "yes"), ("", "yes")]
    + [("Yes. No", "yes"), ("nope", "yes"), ("No, it is. Yes", "no")],
)
def test_official_parse(text: str, answer: str) -> None:
    assert official_answer(text) == answer
