"""ChartQA and DocVQA: numbers within 5%, edit distance, and the public files."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.benchmarks.chartqa import ChartQA, is_right
from eval.benchmarks.docvqa import DocVQA, similarity
from eval.score import score_file
from llava_skip_base.errors import UserError

SHORT = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("105", "100", True),
        ("105.1", "100", False),
        ("95", "100", True),
        ("-100", "100", False),
        ("50%", "0.5", True),
        ("0.51", "50%", True),
        ("50%", "50", False),  # a percent sign divides by 100
        ("1,000", "1000", False),  # a number with a comma is a text
        ("1e3", "1000", True),
        ("0.0", "0", False),  # a gold number of 0 is compared as text
        ("0", "0", True),
        ("Yes", "yes", True),
        ("Yes.", "yes", False),
        ("2012 ", "2012", True),  # a number may have spaces around it
        ("5 %", "0.05", True),
        ("%", "0", False),
        ("nan", "nan", False),
        ("inf", "inf", False),  # inf / inf is no number below 5%
        ("", "", True),
    ],
)
def test_relaxed_accuracy(answer: str, gold: str, right: bool) -> None:
    assert is_right(answer, gold) is right


@pytest.fixture
def chartqa(tmp_path: Path) -> Path:
    folder = tmp_path / "ChartQA" / "test"
    (folder / "png").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "png" / "1.png")
    for split, golds in (("human", ["Yes", "3"]), ("augmented", ["20.5"])):
        rows = [{"imgname": "1.png", "query": f"How many {gold}?", "label": gold} for gold in golds]
        (folder / f"test_{split}.json").write_text(json.dumps(rows))
    return folder.parent


def test_chartqa_has_two_splits(chartqa: Path, tmp_path: Path) -> None:
    samples = ChartQA().load(chartqa)
    assert [sample.id for sample in samples] == ["human/0", "human/1", "augmented/0"]
    assert samples[0].images[0].data == chartqa / "test" / "png" / "1.png"
    assert ChartQA().prompts(samples)[0] == "How many Yes?" + SHORT
    assert ChartQA(protocol="lmms-eval").prompts(samples)[0] == "How many Yes?\nAnswer the question with a single word."
    answers = tmp_path / "a.json"
    answers.write_text(json.dumps({"human/0": " yes", "human/1": "4", "augmented/0": "20"}))
    score = score_file(ChartQA(), answers, chartqa, False, None)
    assert score.scores == {
        "accuracy": pytest.approx(200 / 3),
        "split/augmented": 100.0,
        "split/human": 50.0,
    }
    # lmms-eval compares the text as it was generated, with its space.
    assert score_file(ChartQA("lmms-eval"), answers, chartqa, False, None).scores["split/human"] == 0.0


def test_chartqa_folder_lacks_a_split(chartqa: Path) -> None:
    (chartqa / "test" / "test_human.json").unlink()
    with pytest.raises(UserError, match=r"expected one test_human\.json and one .* saw 1"):
        ChartQA().load(chartqa)
    samples = ChartQA().load(chartqa / "test" / "test_augmented.json")
    assert [sample.id for sample in samples] == ["augmented/0"] and len(samples[0].images) == 1


@pytest.mark.parametrize(
    ("gold", "answer", "official", "vlmevalkit", "lmms_eval"),
    [
        ("['a', 'b']", "b", True, True, False),
        ("[12, 13]", "13", False, True, False),
        ("[Yes, No]", "[yes, no]", True, True, True),
        ("NA", "NA", True, False, True),  # pandas makes it "nan", which is a number
    ],
)
def test_chartqa_gold_answers_that_read_as_lists(
    tmp_path: Path, gold: str, answer: str, official: bool, vlmevalkit: bool, lmms_eval: bool
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"index": 0, "question": "?", "answer": gold, "prediction": answer}]))
    found = [
        score_file(ChartQA(rule), path, None, False, None).score for rule in ("official", "vlmevalkit", "lmms-eval")
    ]
    assert found == [100.0 * right for right in (official, vlmevalkit, lmms_eval)]


@pytest.mark.parametrize(
    ("answer", "golds", "grade"),
    [
        ("New York", ["new  york"], 1.0),
        ("new yrk", ["new york"], 7 / 8),
        ("abcd", ["abxy"], 0.5),
        ("abcd", ["axyz"], 0.0),  # below the threshold
        ("abc", ["xyz", "abd"], 2 / 3),
        ("  ab", ["ab"], 1.0),
        ("   abx", ["ab"], 5 / 6),  # of the length as it was given
        ("", ["a"], 0.0),
        ("", [""], 1.0),
        ("ß", ["x"], 0.5),  # the length is that of "SS"
    ],
)
def test_similarity(answer: str, golds: list[str], grade: float) -> None:
    assert similarity(answer, golds) == pytest.approx(grade)


def docvqa(folder: Path, answers: list[Any]) -> Path:
    (folder / "documents").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "documents" / "x_1.png")
    common = {"question": "What?", "image": "documents/x_1.png", "question_types": ["form", "handwritten"]}
    data = [{**common, "questionId": 337 + n, **({"answers": own} if own else {})} for n, own in enumerate(answers)]
    path = folder / "val_v1.0_withQT.json"
    path.write_text(json.dumps({"dataset_name": "DocVQA", "dataset_split": "val", "data": data}))
    return path


def test_docvqa_annotations(tmp_path: Path) -> None:
    data = docvqa(tmp_path, [["0.28", ".28"], ["itc limited"]])
    samples = DocVQA().load(data)
    assert [sample.id for sample in samples] == [337, 338] and len(samples[0].images) == 1
    assert DocVQA().prompts(samples)[0] == "What?" + SHORT
    # The competition's own form of answers.
    rows = [{"questionId": 337, "answer": "0.28"}, {"questionId": 338, "answer": "ITC limted"}]
    (tmp_path / "sent.json").write_text(json.dumps(rows))
    score = score_file(DocVQA(), tmp_path / "sent.json", data, False, None, tmp_path / "again.json")
    mean = pytest.approx(100 * (1 + 10 / 11) / 2)
    assert score.scores == {"ANLS": mean, "kind/form": mean, "kind/handwritten": mean} and score.score == mean
    assert json.loads((tmp_path / "again.json").read_text()) == rows


def test_docvqa_test_split_is_for_the_server(tmp_path: Path) -> None:
    data = docvqa(tmp_path, [None, None])
    (tmp_path / "a.json").write_text(json.dumps({"337": "1", "338": "2"}))
    score = score_file(DocVQA(), tmp_path / "a.json", data, False, None, tmp_path / "sent.json")
    assert score.status == "unscored"
    assert json.loads((tmp_path / "sent.json").read_text())[0] == {"questionId": 337, "answer": "1"}
