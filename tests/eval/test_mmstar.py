from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks.mmstar import OFFICIAL, MMStar, gain_and_leakage, lacks_official_rows, question_options
from llava_skip_base.errors import UserError

Rows = list[dict[str, Any]]
OFFICIAL_ORDER = [
    "final score",
    "coarse perception",
    "coarse perception(image scene and topic)",
    "coarse perception(image style & quality)",
    "coarse perception(image emotion)",
    "fine-grained perception",
    "fine-grained perception(object counting)",
    "fine-grained perception(recognition)",
    "fine-grained perception(localization)",
    "instance reasoning",
    "instance reasoning(single-instance reasoning)",
    "instance reasoning(cross-instance attribute reasoning)",
    "instance reasoning(cross-instance relation reasoning)",
    "logical reasoning",
    "logical reasoning(code & sequence reasoning)",
    "logical reasoning(diagram reasoning)",
    "logical reasoning(common reasoning)",
    "science & technology",
    "science & technology(biology & chemistry & physics)",
    "science & technology(electronics & energy & mechanical eng.)",
    "science & technology(geography & earth science & agriculture)",
    "math",
    "math(geometry)",
    "math(numeric commonsense and calculation)",
    "math(statistical reasoning)",
]


def official_rows() -> Rows:
    places = [(name, sub) for name, subs in OFFICIAL.items() for sub, count in subs.items() for _ in range(count)]
    return [
        {"index": str(number), "question": "?", "answer": "B", "category": name, "l2_category": sub}
        for number, (name, sub) in enumerate(reversed(places))
    ]


def test_scores_by_hand(write_tsv: Callable[..., Path], mmstar_rows: Rows) -> None:
    samples = MMStar().load(write_tsv(mmstar_rows))
    # Right: 0 (letter), 1 (bracket), 3 (phrase). Wrong: 2 (other letter), 4 (bold).
    answers = {0: "A", 1: "(b) two", 2: "A", 3: "The answer is D.", 4: "**A**"}
    score = MMStar().score(samples, answers)
    assert score.scores == {
        "final score": 3 / 5,
        "coarse perception": 1.0,
        "coarse perception(image scene and topic)": 1.0,
        "coarse perception(image emotion)": 1.0,
        "math": 1 / 3,
        "math(geometry)": 1 / 2,
        "math(statistical reasoning)": 0.0,
    }
    assert list(score.scores)[2:4] == [
        "coarse perception(image scene and topic)",
        "coarse perception(image emotion)",
    ]
    assert score.score == pytest.approx(60.0)
    assert score.counts == {"questions": 5, "hits": 3, "empty": 0, "lookalike_letters": 0}


def test_official_file_has_the_25_values_in_order() -> None:
    samples = MMStar().samples(official_rows())
    answers = {sample.id: "B" if sample.id % 3 == 0 else "C" for sample in samples}
    score = MMStar().score(samples, answers)
    assert list(score.scores) == OFFICIAL_ORDER
    assert score.scores["final score"] == 500 / 1500
    hits = sum(s.id % 3 == 0 for s in samples if s.fields["category"] == "math")
    assert score.scores["math"] == hits / 250


def test_official_file_with_lost_rows_is_noticed() -> None:
    samples = MMStar().samples(official_rows())
    assert lacks_official_rows(samples) == 0
    assert lacks_official_rows(samples[3:]) == 3
    with pytest.raises(UserError, match="lacks 3 of MMStar's 1500 rows"):
        MMStar().check_whole(samples[3:], "x.jsonl")


def test_other_categories_come_from_the_data(write_tsv: Callable[..., Path], mmstar_rows: Rows) -> None:
    mmstar_rows[4] |= {"category": "own", "l2_category": "kind"}
    score = MMStar().score(MMStar().load(write_tsv(mmstar_rows)), dict.fromkeys(range(5), "A"))
    assert score.scores["own"] == score.scores["own(kind)"] == 1.0
    assert list(score.scores)[-1] == "own(kind)"


def test_prompt_with_and_without_option_columns(write_tsv: Callable[..., Path], mmstar_rows: Rows) -> None:
    mmstar_rows[1] |= {"question": "What is in <image 1>?", "A": "x", "B": "y"}
    prompts = MMStar().prompts(MMStar().load(write_tsv(mmstar_rows)))
    instruction = "\nAnswer with the option's letter from the given choices directly."
    assert prompts[0] == "Question 0?\nOptions: A: one, B: two, C: three, D: four" + instruction
    assert prompts[1] == "What is in image?\nA. x\nB. y" + instruction


def test_missing_gold_is_refused(write_tsv: Callable[..., Path], mmstar_rows: Rows) -> None:
    mmstar_rows[2]["answer"] = ""
    samples = MMStar().load(write_tsv(mmstar_rows))
    with pytest.raises(UserError, match=r"1 \(2\) of 5 rows have no gold answer"):
        MMStar().score(samples, dict.fromkeys(range(5), "A"))


@pytest.mark.parametrize(
    ("rule", "right"), [("official", {2, 4}), ("vlmevalkit", {0, 1, 2, 4}), ("lmms-eval", {0, 2, 4})]
)
def test_the_rules_differ(write_tsv: Callable[..., Path], mmstar_rows: Rows, rule: str, right: set[int]) -> None:
    mmstar_rows[1]["question"] = "Hint: choose.\nQuestion: which?\nChoices:\n(A) one\n(B) two\n(C) three"
    samples = MMStar().load(write_tsv(mmstar_rows), with_images=False)
    answers = {0: "**A**", 1: "it is two", 2: "cC: C", 3: "", 4: "answer is A"}
    score = MMStar(rule).score(samples, answers)
    assert {id_ for id_, hit in score.per_sample.items() if hit} == right
    assert bool(score.notes) is (rule != "official")


@pytest.mark.parametrize("rule", ["official", "vlmevalkit", "lmms-eval"])
def test_a_note_says_that_no_answer_was_read(write_tsv: Callable[..., Path], mmstar_rows: Rows, rule: str) -> None:
    samples = MMStar().load(write_tsv(mmstar_rows), with_images=False)
    answers = dict.fromkeys(range(5), "\u7b2c\u4e00\u4e2a")
    score = MMStar(rule).score(samples, answers)
    assert (score.score, "none of the 5 answers names an option" in score.notes[0]) == (0.0, True)
    assert not any("none of" in note for note in MMStar(rule).score(samples, answers | {3: "B"}).notes)


def test_options_that_pandas_reads_as_missing(write_tsv: Callable[..., Path], mmstar_rows: Rows) -> None:
    for row in mmstar_rows:
        row |= {"A": "cat", "B": "NA", "C": "none", "D": "dog", "answer": "B"}
    mmstar_rows[1]["answer"] = "A"
    mmstar_rows[2]["answer"] = "C"
    samples = MMStar().load(write_tsv(mmstar_rows), with_images=False)
    answers = {0: "B", 1: "A, not B", 2: "none", 3: "None", 4: "NA"}
    # B is no option for VLMEvalKit, whose pandas reads its text as missing, and an answer "None" is read as "nan".
    assert [id_ for id_, hit in MMStar("vlmevalkit").score(samples, answers).per_sample.items() if hit] == [1, 2]


def test_lmms_evals_averages_have_no_weights(write_tsv: Callable[..., Path], mmstar_rows: Rows) -> None:
    samples = MMStar().load(write_tsv(mmstar_rows), with_images=False)
    score = MMStar("lmms-eval").score(samples, {0: "A", 1: "B", 2: "A", 3: "A", 4: "A"})
    assert score.scores["math(geometry)"] == 1 / 2
    assert score.scores["math"] == (1 / 2 + 1) / 2
    assert score.scores["final score"] == (1 + 0 + 1 / 2 + 1) / 4


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Q?\nOptions: A: x, B: nan, C: a, b: c, D: 3", {"A": "x", "B": "nan", "C": "a, b: c", "D": "3"}),
        ("Hint\nQuestion: Q?\nChoices:\n(A) 1.5\n(B) (C) 2", {"A": "1.5", "B": "(C) 2"}),
        ("Q?", dict.fromkeys("ABCD", "")),
    ],
)
def test_options_inside_the_question(question: str, options: dict[str, str]) -> None:
    assert question_options({"question": question}) == options


def test_prompts_of_the_other_protocols(write_tsv: Callable[..., Path], mmstar_rows: Rows) -> None:
    mmstar_rows[1] |= {"question": "What in <image 1>?", "A": "x", "B": "y"}
    samples = MMStar().load(write_tsv(mmstar_rows), with_images=False)
    embedded = "Question 0?\nOptions: A: one, B: two, C: three, D: four"
    letter = "Answer with the option's letter from the given choices directly"
    assert MMStar(protocol="official").prompts(samples)[0] == embedded + "\nAnswer the question directly."
    assert MMStar(protocol="vlmevalkit").prompts(samples)[1] == f"What in <image 1>?\nA. x\nB. y\n{letter}."
    assert MMStar(protocol="lmms-eval").prompts(samples)[0] == f"{embedded}\n{letter}"


def test_gain_and_leakage_of_the_published_example() -> None:
    measured = gain_and_leakage(52.1, 22.7, 20.3)
    assert round(measured["multi-modal gain"], 1) == 29.4
    assert round(measured["multi-modal leakage"], 1) == 2.4
    assert gain_and_leakage(50.0, 20.0, 25.0)["multi-modal leakage"] == 0.0
