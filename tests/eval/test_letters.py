"""ScienceQA, SEED-Bench and AI2D: which letter an answer names, and their public files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.benchmarks.ai2d import AI2D
from eval.benchmarks.ai2d import lmms_eval_letter as ai2d_letter
from eval.benchmarks.scienceqa import ScienceQA, lmms_eval_letter, official_letter
from eval.benchmarks.seedimage import SEEDImage
from eval.mean_benchmark import numbered_letter
from eval.score import score_file
from llava_skip_base.errors import UserError

INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("answer", "official", "lmms_eval", "ai2d"),
    [
        ("B", "B", "B", "B"),
        ("b", None, "B", "B"),
        ("B. rain", "B", "B", "B"),
        ("B.", None, "B", "B"),
        ("B.rain", None, "B", "B"),
        (" B. rain", None, "B", "B"),
        ("(B)", None, None, "B"),
        ("B\n", None, "B", None),
        ("The answer is B.", "B", None, None),
        ("The answer is B", None, None, None),  # the official pattern wants one more character
        ("The answer is B. The answer is C.", None, None, None),
        ("rain", None, None, None),
        ("É", None, "É", None),
        ("", None, None, None),
    ],
)
def test_letters_by_rule(answer: str, official: str | None, lmms_eval: str | None, ai2d: str | None) -> None:
    assert (official_letter(answer), lmms_eval_letter(answer), ai2d_letter(answer)) == (official, lmms_eval, ai2d)


@pytest.mark.parametrize(("cell", "letter"), [("0", "A"), ("25", "Z"), ("26", "26"), ("C", "C"), ("00099", "00099")])
def test_gold_answers_are_letters_or_numbers_from_0(cell: str, letter: str) -> None:
    assert numbered_letter(cell) == letter


@pytest.fixture
def scienceqa(tmp_path: Path) -> Path:
    """Two questions with an image and one without, in the test split, and one of another split."""
    folder = tmp_path / "scienceqa"
    common = {"choices": ["sun", "rain", "snow"], "answer": 1, "subject": "natural science"}
    problems = {
        "4": {**common, "question": "What falls?", "hint": "Look up.", "image": "image.png", "split": "test"},
        "5": {**common, "question": "What is wet?", "hint": "", "image": None, "split": "test"},
        "7": {**common, "question": "What is  it?", "hint": "", "image": "image.png", "split": "test", "answer": 2},
        "9": {**common, "question": "Other?", "hint": "", "image": None, "split": "val"},
    }
    for id_ in ("4", "7"):
        (folder / "images/test" / id_).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "images/test" / id_ / "image.png")
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["7", "4", "5"], "val": ["9"]}))
    return folder


def answer_lines(path: Path, answers: dict[str, str]) -> Path:
    rows = [{"question_id": id_, "prompt": "?", "text": text} for id_, text in answers.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scienceqa_counts_questions_with_an_image(scienceqa: Path, tmp_path: Path) -> None:
    answers = answer_lines(tmp_path / "a.jsonl", {"4": "B. rain", "5": "The answer is B.", "7": "A"})
    score = score_file(ScienceQA(), answers, scienceqa, False, None)
    assert score.scores == {
        "IMG-Accuracy": 50.0,
        "Accuracy": pytest.approx(200 / 3),
        "subject/natural science": 50.0,
    }
    assert score.score == 50.0 and score.per_sample == {7: False, 4: True}
    assert score.counts["with_image"] == 2
    assert any("over the 2 questions with an image" in note for note in score.notes)


def test_scienceqa_letters_beyond_the_options_are_wrong(scienceqa: Path, tmp_path: Path) -> None:
    answers = answer_lines(tmp_path / "a.jsonl", dict.fromkeys("457", "D"))
    score = score_file(ScienceQA(), answers, scienceqa, False, None)
    assert score.score == 0 and score.counts["unreadable"] == 3
    assert any("3 of 3 answers cannot be read by this rule" in note for note in score.notes)


def test_scienceqa_asks_as_llava(scienceqa: Path) -> None:
    samples = ScienceQA().load(scienceqa)
    assert [(sample.id, len(sample.images)) for sample in samples] == [(7, 1), (4, 1), (5, 0)]
    listed = "\nA. sun\nB. rain\nC. snow"
    assert ScienceQA().prompts(samples)[1] == f"Context: Look up.\nWhat falls?{listed}{INSTRUCTION}"
    assert ScienceQA(protocol="lmms-eval").max_new_tokens == 16
    assert ScienceQA(protocol="vlmevalkit").prompts(samples)[1].startswith("Hint: Look up.\nQuestion: What falls?\n")
    turns = [{"from": "human", "value": f"<image>\nWhat is it?{listed}"}, {"from": "gpt", "value": "C"}]
    asked = [{"id": "7", "image": "7/image.png", "conversations": turns}]
    (scienceqa / "llava_test_CQM-A.json").write_text(json.dumps(asked))
    samples = ScienceQA().load(scienceqa / "problems.json")
    assert ScienceQA().prompts(samples)[0] == f"What is it?{listed}{INSTRUCTION}"
    assert ScienceQA(protocol="lmms-eval").prompts(samples)[0] == f"What is  it?{listed}{INSTRUCTION}"


def test_scienceqa_without_its_list_of_splits(scienceqa: Path) -> None:
    (scienceqa / "pid_splits.json").unlink()
    assert [sample.id for sample in ScienceQA().load(scienceqa)] == [4, 5, 7]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("pid_splits.json", {"test": ["4", "8"]}, r"lacks 1 \(8\) of 2 questions that pid_splits.json names"),
        ("pid_splits.json", {"test": "4"}, "expected a list of ids under 'test'"),
        ("pid_splits.json", {"test": []}, "holds no question of the split 'test'"),
        ("problems.json", {"4": {"question": "?", "image": ["x"], "split": "test"}}, "lacks|its image is no file name"),
        ("llava_test_CQM-A.json", [{"id": "4", "conversations": []}], "question 4 has no conversation"),
    ],
)
def test_scienceqa_refuses(scienceqa: Path, name: str, content: Any, error: str) -> None:
    (scienceqa / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=error):
        ScienceQA().load(scienceqa)


def test_scienceqa_folder_without_problems(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no problems\.json"):
        ScienceQA().load(tmp_path)


def test_scienceqa_text_alone_has_no_headline(tmp_path: Path) -> None:
    row = {"question": "?", "choices": ["x", "y"], "answer": 0, "image": None, "prediction": "A"}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match="none of the 1 questions has an image"):
        score_file(ScienceQA(), tmp_path / "a.json", None, False, None)


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    folder = tmp_path / "seed_bench"
    (folder / "SEED-Bench-image").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "SEED-Bench-image" / "1_2.png")
    (folder / "SEED-Bench-image" / "1_2.png").rename(folder / "SEED-Bench-image" / "1_2")
    options = {"choice_a": "one", "choice_b": "two", "choice_c": "3", "choice_d": "four"}
    kinds = [(5, "image", "B"), (9, "image", "D"), (5, "image", "A"), (10, "video", "A")]
    questions = [
        {
            **{"question": f"How many {n}?", **options, "answer": gold, "question_id": f"10{n}"},
            **{"data_type": part, "data_id": "1_2", "question_type_id": kind},
        }
        for n, (kind, part, gold) in enumerate(kinds)
    ]
    named = {"Instances Counting": 5, "Text Understanding": 9, "Action Recognition": 10}
    (folder / "SEED-Bench.json").write_text(json.dumps({"question_type": named, "questions": questions}))
    return folder


@pytest.mark.parametrize(("rule", "score"), [("lmms-eval", 200 / 3), ("llava", 100 / 3), ("vlmevalkit", 200 / 3)])
def test_seed_scores_its_image_part(seed: Path, tmp_path: Path, rule: str, score: float) -> None:
    answers = answer_lines(tmp_path / "a.jsonl", {"100": "B", "101": "D. four", "102": "C", "103": "A"})
    found = score_file(SEEDImage(rule), answers, seed, False, None, tmp_path / "up.jsonl")
    assert found.score == pytest.approx(score)
    assert found.scores["kind/Instances Counting"] == 50.0
    assert found.scores["kind/Text Understanding"] == (0.0 if rule == "llava" else 100.0)
    assert found.counts["unknown"] == 1  # the video's
    sent = [json.loads(line) for line in (tmp_path / "up.jsonl").read_text().splitlines()]
    assert sent[1] == {"question_id": "101", "prediction": "D. four"} and len(sent) == 3


def test_seed_asks_with_four_options(seed: Path) -> None:
    samples = SEEDImage().load(seed)
    assert [len(sample.images) for sample in samples] == [1, 1, 1]
    assert SEEDImage().prompts(samples)[0] == "How many 0?\nA. one\nB. two\nC. 3\nD. four" + INSTRUCTION


def test_a_last_option_that_reads_none_is_asked_as_well(seed: Path, scienceqa: Path, tmp_path: Path) -> None:
    """The questions of LLaVA and lmms-eval have all options, also where "None" is last and wrong."""
    path = seed / "SEED-Bench.json"
    path.write_text(path.read_text().replace("four", "None"))
    assert SEEDImage().prompts(SEEDImage().load(seed))[0].endswith("C. 3\nD. None" + INSTRUCTION)
    problems = scienceqa / "problems.json"
    problems.write_text(problems.read_text().replace("snow", "none"))
    samples = ScienceQA().load(scienceqa)
    assert "\nC. none\n" in ScienceQA().prompts(samples)[0]
    assert ScienceQA().letter("C", samples[0].fields) == "C"


def test_seed_of_videos_alone_is_refused(seed: Path) -> None:
    whole = json.loads((seed / "SEED-Bench.json").read_text())
    (seed / "SEED-Bench.json").write_text(json.dumps({**whole, "questions": whole["questions"][3:]}))
    with pytest.raises(UserError, match="has 1 questions, and none of them is about an image"):
        SEEDImage().load(seed)
    with pytest.raises(UserError, match=r"holds no SEED-Bench\.json"):
        SEEDImage().load(seed / "SEED-Bench-image")


def test_ai2d_of_vlmevalkit(write_tsv: Callable[..., Path], encoded_image: Callable[..., str]) -> None:
    row = {"question": "Which?", "A": "leaf", "B": "None", "C": "root", "D": "", "image": encoded_image()}
    path = write_tsv([{"index": n, **row, "answer": gold, "prediction": "B"} for n, gold in enumerate("BC")])
    samples = AI2D().load(path)
    assert AI2D().prompts(samples)[0] == "Which?\nA. leaf\nB. None\nC. root" + INSTRUCTION
    assert len(samples[0].images) == 1
    assert score_file(AI2D(), path, None, False, None).score == 50.0
    # pandas reads the option "None" as missing, so B is no letter of VLMEvalKit's.
    assert score_file(AI2D("vlmevalkit"), path, None, False, None).score == 0.0
    with pytest.raises(UserError, match="ai2d has no submission file"):
        score_file(AI2D(), path, None, False, None, path.with_name("sent.json"))
