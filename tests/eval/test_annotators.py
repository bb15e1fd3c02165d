"""VQAv2 and VizWiz: the evaluators' normalisation, the public files, and what their servers take."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.benchmarks.vizwiz import VizWiz
from eval.benchmarks.vqav2 import WHOLE_TEST, VQAv2
from eval.score import score_file
from eval.scoring.vqa import evaluator_form, evaluator_golds, plain_form, share_of_annotators
from llava_skip_base.errors import UserError

SHORT = "\nAnswer the question using a single word or phrase."
UNSURE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


@pytest.mark.parametrize(
    ("text", "evaluator", "plain"),
    [
        ("Two dogs.", "2 dogs", "2 dogs"),
        ("the cat's", "cat's", "cat's"),  # mmf's form splits the 's
        ("1,000", "1000", "1000"),
        ("1,,2", "1 2", "12"),
        ("yes, sir", "yes sir", "yes sir"),
        ("what?", "what", "what"),
        ("dont", "don't", "don't"),
        ("coca\ncola", "coca cola", "coca cola"),
        ("none", "0", "0"),
        ("the", "", ""),
    ],
)
def test_forms_of_an_answer(text: str, evaluator: str, plain: str) -> None:
    assert (evaluator_form(text), plain_form(text)) == (evaluator, plain)


def test_the_evaluator_changes_annotators_answers_only_where_they_differ() -> None:
    assert evaluator_golds(["new-york"] * 10) == ["new-york"] * 10
    assert evaluator_golds(["new-york", "Two."]) == ["new york", "Two"]
    assert share_of_annotators("2", ["Two", "two", "2"]) == pytest.approx((1 / 3 + 1 / 3) / 3)


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in value) if lines else json.dumps(value))
    return path


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


@pytest.fixture
def vqav2(tmp_path: Path) -> Path:
    folder = tmp_path / "vqav2"
    picture(folder / "val2014" / "COCO_val2014_000000000042.jpg")
    questions = [{"image_id": 42, "question": f"Is it {n}?", "question_id": 42000 + n} for n in range(3)]
    kinds = ["yes/no", "number", "other"]
    said = [["yes"] * 10, ["2"] * 2 + ["3"] * 8, ["new-york"] * 10]
    annotations = [
        {
            **{"question_id": 42000 + n, "image_id": 42, "answer_type": kinds[n], "question_type": "is it"},
            "answers": [{"answer": text, "answer_id": i, "answer_confidence": "yes"} for i, text in enumerate(said[n])],
        }
        for n in range(3)
    ]
    whole = {"data_subtype": "val2014", "license": {}, "questions": questions}
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", whole)
    write(folder / "v2_mscoco_val2014_annotations.json", {"info": {}, "annotations": annotations[::-1]})
    return folder


@pytest.mark.parametrize("rule", ["official", "llava", "lmms-eval"])
def test_vqav2_by_kind_of_answer(vqav2: Path, tmp_path: Path, rule: str) -> None:
    answers = {"42000": "Yes.", "42001": "two", "42002": "New-York"}
    rows = [{"question_id": int(id_), "answer": text} for id_, text in answers.items()]
    score = score_file(VQAv2(rule), write(tmp_path / "sent.json", rows), vqav2, False, None)
    # Where all annotators agree, the evaluator leaves their answer as it is, and only the model's loses the hyphen.
    last = 100.0 if rule == "lmms-eval" else 0.0
    assert score.scores == {
        "accuracy": pytest.approx((100 + 60 + last) / 3),
        "answer type/number": pytest.approx(60.0),
        "answer type/other": last,
        "answer type/yes/no": 100.0,
    }


def test_vqav2_images_and_prompts(vqav2: Path) -> None:
    samples = VQAv2().load(vqav2)
    assert [sample.id for sample in samples] == [42000, 42001, 42002]
    assert samples[0].images[0].data == vqav2 / "val2014" / "COCO_val2014_000000000042.jpg"
    assert VQAv2().prompts(samples)[0] == "Is it 0?" + SHORT
    assert VQAv2(protocol="lmms-eval").max_new_tokens == 16


def test_vqav2_refuses_files_that_do_not_fit(vqav2: Path) -> None:
    annotations = vqav2 / "v2_mscoco_val2014_annotations.json"
    whole = json.loads(annotations.read_text())
    write(annotations, {"annotations": whole["annotations"][1:]})
    with pytest.raises(UserError, match=r"lacks 1 \(42002\) of the 3 questions"):
        VQAv2().load(vqav2)
    write(annotations, {"info": {}})
    with pytest.raises(UserError, match="expected a list under 'annotations'"):
        VQAv2().load(vqav2)
    write(vqav2 / "v2_OpenEnded_mscoco_train2014_questions.json", {})
    with pytest.raises(UserError, match="holds 2 .*give one file"):
        VQAv2().load(vqav2)
    with pytest.raises(UserError, match="2 .* of 3 questions have no gold answer"):
        rows = [{"question_id": n, "question": "?", "answers": [[], ["a"], []][n], "prediction": "a"} for n in range(3)]
        score_file(VQAv2(), write(vqav2 / "own.json", rows), None, False, None)


def test_vqav2_test_dev_is_answered_for_the_server(tmp_path: Path) -> None:
    rows = [
        {
            "question_id": 10 + n,
            "image": "COCO_test2015_000000000010.jpg",
            "text": f"Is it {n}?{SHORT}",
            "category": "x",
        }
        for n in range(3)
    ]
    data = write(tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl", rows[:2])
    picture(tmp_path / "test2015" / "COCO_test2015_000000000010.jpg")
    samples = VQAv2().load(data)
    assert VQAv2().prompts(samples) == [f"Is it {n}?{SHORT}" for n in range(2)] and len(samples[0].images) == 1
    answers = write(
        tmp_path / "a.jsonl", [{"question_id": 10 + n, "prompt": "?", "text": "The Cat's."} for n in (0, 1)]
    )
    score = score_file(VQAv2(), answers, data, False, None, tmp_path / "up.json")
    assert score.status == "unscored" and score.score is None
    assert any("none of the 2 questions has a gold answer" in note and "--submission" in note for note in score.notes)
    sent = [{"question_id": 10, "answer": "cat 's"}, {"question_id": 11, "answer": "cat 's"}]
    assert json.loads((tmp_path / "up.json").read_text()) == sent
    # The server wants all test questions; LLaVA leaves the answers of the others empty.
    write(tmp_path / WHOLE_TEST, rows)
    score = score_file(VQAv2(), answers, data, False, None, tmp_path / "up.json")
    assert json.loads((tmp_path / "up.json").read_text()) == [*sent, {"question_id": 12, "answer": ""}]
    write(tmp_path / WHOLE_TEST, rows[1:])
    with pytest.raises(UserError, match=r"lacks 1 \(10\) of 2 questions"):
        score_file(VQAv2(), answers, data, False, None, tmp_path / "up.json")


def vizwiz_rows() -> list[dict[str, Any]]:
    said = [["unanswerable"] * 10, ["Coca Cola"] * 2 + ["coca cola"] * 8]
    return [
        {
            **{"image": f"VizWiz_val_0000000{n}.jpg", "question": "What IS it?", "answerable": n},
            **{"answer_type": ["unanswerable", "other"][n]},
            "answers": [{"answer": text, "answer_confidence": "yes"} for text in said[n]],
        }
        for n in range(2)
    ]


@pytest.mark.parametrize(("rule", "second"), [("official", 100.0), ("llava", 100.0), ("lmms-eval", 100.0)])
def test_vizwiz_by_kind_of_answer(tmp_path: Path, rule: str, second: float) -> None:
    data = write(tmp_path / "val.json", vizwiz_rows())
    # The server's own form names images; LLaVA's names the question.
    rows = [{"image": f"VizWiz_val_0000000{n}.jpg", "answer": ["Unanswerable", "the coca cola"][n]} for n in range(2)]
    score = score_file(VizWiz(rule), write(tmp_path / "up.json", rows), data, False, None, tmp_path / "again.json")
    assert score.scores["answer type/unanswerable"] == 100.0 and score.scores["answer type/other"] == second
    assert score.counts["said_unanswerable"] == 1
    assert json.loads((tmp_path / "again.json").read_text())[1] == {
        "image": "VizWiz_val_00000001.jpg",
        "answer": "coca cola",
    }


def test_vizwiz_annotators_answers_stay_as_they_are(tmp_path: Path) -> None:
    row = {**vizwiz_rows()[1], "answers": ["Coca-Cola"] * 10, "prediction": "Coca-Cola"}
    path = write(tmp_path / "a.json", [row])
    assert score_file(VizWiz(), path, None, False, None).score == 0.0
    assert score_file(VizWiz("lmms-eval"), path, None, False, None).score == 100.0


def test_vizwiz_asks_as_llava(tmp_path: Path) -> None:
    data = write(tmp_path / "val.json", vizwiz_rows())
    for row in vizwiz_rows():
        picture(tmp_path / "val" / row["image"])
    samples = VizWiz().load(data)
    assert [sample.id for sample in samples] == ["VizWiz_val_00000000", "VizWiz_val_00000001"]
    assert VizWiz().prompts(samples)[0] == f"What IS it?{UNSURE}{SHORT}" and VizWiz().protocol(samples) == "llava"
    assert VizWiz(protocol="lmms-eval").prompts(samples)[0] == f"What is it?{UNSURE}{SHORT}"
    asked = [{"question_id": 3, "image": "VizWiz_test_00000003.jpg", "text": f"What IS it?{UNSURE}{SHORT}"}]
    samples = VizWiz().load(write(tmp_path / "llava_test.jsonl", asked), with_images=False)
    assert (samples[0].id, VizWiz().prompts(samples)) == (3, [f"What IS it?{UNSURE}{SHORT}"])
    answers = write(tmp_path / "a.jsonl", [{"question_id": 3, "prompt": "?", "text": "A Cup."}])
    score = score_file(VizWiz(), answers, tmp_path / "llava_test.jsonl", False, None, tmp_path / "up.json")
    assert score.status == "unscored"
    assert json.loads((tmp_path / "up.json").read_text()) == [{"image": "VizWiz_test_00000003.jpg", "answer": "cup"}]


def test_vizwiz_without_unanswerable_questions_leaves_the_sentence_out(tmp_path: Path) -> None:
    rows = [{**row, "answerable": 1} for row in vizwiz_rows()]
    samples = VizWiz().load(write(tmp_path / "val.json", rows), with_images=False)
    assert VizWiz().protocol(samples) == "llava-answerable" and VizWiz().prompts(samples)[0] == f"What IS it?{SHORT}"
    # The first questions of a file with others are asked as the whole file is.
    samples = VizWiz().load(write(tmp_path / "val.json", vizwiz_rows()), with_images=False)
    assert VizWiz().protocol(samples[1:]) == "llava"
