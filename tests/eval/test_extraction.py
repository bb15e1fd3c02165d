import pytest

from eval.benchmarks.mmstar import is_right
from eval.extraction import extract_choice

OPTIONS = {"A": "a red car", "B": "a blue boat", "C": "two dogs", "D": "nothing"}

# prediction, letter that VLMEvalKit extracts, gold letter that MMStar's official rule counts as right ("-" for none)
CASES = [
    *[(text, "A", "A") for text in ("A", "A.", "(A)", "A)", "(A).", "A:", "A,")],
    ("a", "-", "A"),
    ("(b)", "-", "B"),
    ("b)", "-", "B"),
    ("**A**", "A", "-"),
    ('"A"', "-", "-"),
    ("`A`", "-", "-"),
    *[(text, "-", "A") for text in ("A/B", "A and B", "A or B", "A B C D")],
    ("Both A and C", "-", "B"),
    ("The answer is A", "A", "A"),
    ("The answer is A.", "A", "A"),
    ("answer is **b**", "B", "A"),
    ("The correct answer is **B**. The others do not fit and A is wrong", "B", "-"),
    ("The answer is (C), two dogs", "C", "-"),
    ("Option B", "B", "B"),
    ("option b", "-", "B"),
    ("B. a blue boat", "B", "B"),
    ("B: a blue boat", "B", "B"),
    ("A blue boat", "A", "A"),
    ("There is A blue boat in it", "B", "-"),
    ("a blue boat", "B", "A"),
    ("The image shows two dogs playing", "C", "-"),
    *[(text, "-", "-") for text in ("two dogs and a red car", "None of the above", "")],
    ("I think it is B because the boat is blue in colour", "-", "-"),
    ("A: B", "-", "A"),
    ("Z", "Z", "-"),
    ("E", "-", "-"),
    ("Cannot determine the answer", "Z", "C"),
    *[(text, "-", "-") for text in ("答案是B", "选B", "-B")],
    ("B。", "-", "B"),
    ("B、", "-", "B"),
]


@pytest.mark.parametrize(("prediction", "letter", "_official"), CASES)
def test_vlmevalkit_rule(prediction: str, letter: str, _official: str) -> None:
    assert (extract_choice(prediction, OPTIONS) or "-") == letter


@pytest.mark.parametrize(("prediction", "_letter", "official"), CASES)
def test_mmstar_official_rule(prediction: str, _letter: str, official: str) -> None:
    right = [letter for letter in "ABCD" if is_right(prediction, letter)]
    assert right == ([] if official == "-" else [official])


def test_letters_that_are_no_options_do_not_count() -> None:
    assert extract_choice("C", {"A": "cat", "B": "dog"}) is None
    assert extract_choice("E", {"A": "x", "E": "y"}) == "E"


def test_text_rule_has_a_length_cap() -> None:
    options = {"A": "cat", "B": "dog"}
    assert extract_choice("it is a dog", options) == "B"
    assert extract_choice("it is a dog!!", options) is None  # 13 characters, more than twice 3 + 3


def test_a_letter_must_be_among_the_last_four_words() -> None:
    options = {"A": "cat", "B": "dog"}
    assert extract_choice("B it must be", options) == "B"
    assert extract_choice("B it must surely be", options) is None
    assert extract_choice("B it must surely be B", options) is None  # the first occurrence counts


def test_api_failure_is_no_answer() -> None:
    assert extract_choice("Failed to obtain answer via API. A", {"A": "answer", "B": "dog"}) is None


@pytest.mark.parametrize(("prediction", "gold"), [("Option C", "c"), ("the answer is\nc", "C"), (" (c) three", "C")])
def test_mmstar_rule_normalises(prediction: str, gold: str) -> None:
    assert is_right(prediction, gold)
