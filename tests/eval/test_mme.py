import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.benchmark import match
from eval.benchmarks.mme import MME, lmms_eval_answer, official_answer
from eval.score import score_file
from llava_skip_base.errors import UserError

# Category, image, and two questions with gold and answer. color: 3 of 4 right, one image of two wholly right.
QUESTIONS = [
    ("color", "0001", "Is the car red?", "Yes", "Yes, it is."),
    ("color", "0001", "Is the car blue?", "No", "no"),
    ("color", "0002", "Is there a dog?", "Yes", "Nothing"),
    ("color", "0002", "Is there a cat?", "No", "NO."),
    ("code_reasoning", "0009", "Does it print 1?", "Yes", "The answer is yes"),
    ("code_reasoning", "0009", "Does it print 2?", "No", " No"),
]


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """The release folder, with and without its images in a folder of their own."""
    for category, name, question, gold, _ in QUESTIONS:
        folder = tmp_path / "MME" / "MME_Benchmark_release_version" / category
        nested = category == "code_reasoning"
        texts, images = (folder / "questions_answers_YN", folder / "images") if nested else (folder, folder)
        texts.mkdir(parents=True, exist_ok=True)
        images.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(images / f"{name}.{'png' if nested else 'jpg'}")
        with (texts / f"{name}.txt").open("a") as file:
            file.write(f"{question}  Please answer yes or no.\t{gold}\n")
    return tmp_path / "MME"


def llava_rows() -> list[dict[str, Any]]:
    instruction = "\nAnswer the question using a single word or phrase."
    return [
        {"question_id": f"{category}/{name}.png", "prompt": question + instruction, "text": answer, "model_id": "m"}
        for category, name, question, _, answer in QUESTIONS
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check(score: Any) -> None:
    # Acc 3 of 4 and 1 of 2 images; the official rule finds no yes in the first four characters of "The answer".
    assert score.scores["categories"] == {"color": 75.0 + 50.0, "code_reasoning": 50.0 + 0.0}
    assert (score.scores["perception"], score.scores["cognition"], score.score) == (125.0, 50.0, 125.0)
    assert score.counts["other"] == 1


def test_llava_answers_on_the_release(release: Path, tmp_path: Path) -> None:
    predictions = write_jsonl(tmp_path / "answers.jsonl", llava_rows())
    check(score_file(MME(), predictions, release, False, None))


def test_result_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    for category, name, question, gold, answer in QUESTIONS:
        with (folder / f"{category}.txt").open("a") as file:
            file.write(f"{name}.txt\t{question} Please answer yes or no.\t{gold}\t{answer}\n")
    check(score_file(MME(), folder, None, False, None))


@pytest.mark.parametrize("rule", ["official", "vlmevalkit"])
def test_vlmevalkit_file_alone(write_tsv: Callable[..., Path], rule: str) -> None:
    rows = [
        {"index": n, "question": q, "answer": gold, "category": c, "image_path": f"{c}/{name}.png", "prediction": said}
        for n, (c, name, q, gold, said) in enumerate(QUESTIONS)
    ]
    score = score_file(MME(rule), write_tsv(rows), None, False, None)
    if rule == "official":
        check(score)
    else:  # "The answer is yes" has the word, "Nothing" has not
        assert score.scores["categories"] == {"color": 75.0 + 50.0, "code_reasoning": 200.0}


def test_prompts_and_images_of_the_release(release: Path) -> None:
    samples = MME().load(release)
    assert len(samples) == 6
    prompts = dict(zip((s.id for s in samples), MME().prompts(samples), strict=True))
    assert prompts["color/0001: Is the car red?"] == (
        "Is the car red?\nAnswer the question using a single word or phrase."
    )
    assert {sample.images[0].open().size for sample in samples} == {(4, 4)}


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Yes", "yes"), ("no.", "no"), (" No", "no"), ("nothing", "no"), ("Not sure", "no"), ("None", "no")]
    + [("The answer is no", None), ("", None), ("y", None), ("yes and no", "yes"), ("Oh yes", None)],
)
def test_official_parse(text: str, answer: str | None) -> None:
    assert official_answer(text) == answer


def test_an_image_with_one_question_is_refused(release: Path) -> None:
    samples = MME().load(release, with_images=False)[:-1]
    with pytest.raises(UserError, match=r"1 \(code_reasoning/0009\) images do not have two questions"):
        MME().score(samples, {sample.id: "yes" for sample in samples})


def test_missing_and_doubled_answers(release: Path, tmp_path: Path) -> None:
    samples = MME().load(release, with_images=False)
    found = MME().predictions([*llava_rows()[:5]], "x", samples)
    with pytest.raises(UserError, match=r"1 \(code_reasoning/0009: Does it print 2\?\) of 6 predictions are missing"):
        match(samples, found)
    with pytest.raises(UserError, match="ids occur more than once: 1 .color/0001: Is the car red"):
        MME().predictions([*llava_rows(), llava_rows()[0]], "x", samples)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "artwork.txt").write_bytes(b"0001.jpg\tIs it by C\xe9zanne?\tYes\n")
    with pytest.raises(UserError, match=r"artwork\.txt is not UTF-8 text .* in position 19"):
        MME().read(tmp_path)


def test_bad_folders_and_lines_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither a folder nor a txt file of an"):
        MME().read(tmp_path)
    (tmp_path / "color.txt").write_text("0001.txt\tIs it?\n")
    with pytest.raises(UserError, match=r"color\.txt, line 1: 2 fields"):
        MME().read(tmp_path)


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Yes.", "yes"), ("y", "yes"), (" N. ", "no"), ("y.e.s", "yes"), ("x", None), ("the no", None), ("", None)],
)
def test_lmms_evals_parse(text: str, answer: str | None) -> None:
    assert lmms_eval_answer(text) == answer
