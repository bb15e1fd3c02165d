import pytest

from eval.benchmarks.mmstar import is_right
from eval.scoring.extraction import (
    EXTRACTORS,
    is_lookalike,
    lmms_eval,
    lmms_eval_extractor,
    lmms_eval_static,
    vlmevalkit,
    vlmevalkit_2024,
)

OPTIONS = {"A": "a red car", "B": "a blue boat", "C": "two dogs", "D": "nothing"}
RULES = ("vlmevalkit", "vlmevalkit-2024", "lmms-eval", "lmms-eval-extractor", "mmstar-official")

# An answer, and for each of RULES the letter it extracts, or the gold letter that MMStar's own rule counts as right.
MEASURED = [
    *[(text, "A A A A A") for text in ("A", "A.", "(A)", "A)", "(A).", "A:", "A,")],
    ("a", "- - - - A"),
    *[(text, "- - - - B") for text in ("(b)", "b)")],
    ("**A**", "A A - A -"),
    *[(text, "- - - A -") for text in ('"A"', "`A`")],
    *[(text, "- - - A A") for text in ("A/B", "A and B", "A or B", "A B C D")],
    ("Both A and C", "- - - C B"),
    ("The answer is A", "A A - A A"),
    ("The answer is A.", "A A A A A"),
    ("answer is **b**", "B - - - A"),
    ("The correct answer is **B**. The others do not fit and A is wrong", "B - - A -"),
    ("The answer is (C), two dogs", "C C C C -"),
    ("Option B", "B B B B B"),
    ("option b", "- - - - B"),
    *[(text, "B B B B B") for text in ("B. a blue boat", "B: a blue boat")],
    ("A blue boat", "A A A A A"),
    ("There is A blue boat in it", "B A B A -"),
    ("a blue boat", "B B B - A"),
    ("The image shows two dogs playing", "C C C - -"),
    *[(text, "- - - - -") for text in ("two dogs and a red car", "None of the above", "")],
    ("I think it is B because the boat is blue in colour", "- B B B -"),
    ("A: B", "- - B A A"),
    ("Z", "Z Z - - -"),
    ("E", "- - E - -"),
    ("Cannot determine the answer", "Z Z - C C"),
    *[(text, "- - - B -") for text in ("答案是B", "选B", "-B")],
    *[(text, "- - - B B") for text in ("B。", "B、")],
]


@pytest.mark.parametrize(("prediction", "letters"), MEASURED)
@pytest.mark.parametrize("rule", RULES)
def test_measured_behaviour(prediction: str, letters: str, rule: str) -> None:
    expected = letters.split()[RULES.index(rule)]
    if rule == "mmstar-official":
        assert [letter for letter in "ABCD" if is_right(prediction, letter)] == [expected] * (expected != "-")
    elif rule == "lmms-eval-extractor":
        assert (lmms_eval_extractor(prediction, OPTIONS) or "-") == expected
    else:
        assert (EXTRACTORS[rule](prediction, OPTIONS) or "-") == expected


def test_letters_that_are_no_options_do_not_count() -> None:
    options = {"A": "cat", "B": "dog"}
    assert vlmevalkit("C", options) is vlmevalkit_2024("C", options) is lmms_eval_extractor("C", options) is None
    assert lmms_eval("C", options) == lmms_eval_static("C", options) == "C"  # its letters are always A to E
    assert vlmevalkit("E", {"A": "x", "E": "y"}) == "E"


def test_text_rule_has_a_length_cap_since_2025() -> None:
    options = {"A": "cat", "B": "dog"}
    assert vlmevalkit("it is a dog", options) == "B"
    assert vlmevalkit("it is a dog!!", options) is None  # 13 characters, more than twice 3 + 3
    assert vlmevalkit_2024("it is a dog!!", options) == lmms_eval("it is a dog!!", options) == "B"


def test_a_letter_must_be_among_the_last_four_words_since_2025() -> None:
    options = {"A": "cat", "B": "dog"}
    assert vlmevalkit("B it must be", options) == "B"
    assert vlmevalkit("B it must surely be", options) is None
    assert vlmevalkit("B it must surely be B", options) is None  # the first occurrence counts
    assert vlmevalkit_2024("B it must surely be", options) == "B"


@pytest.mark.parametrize("rule", ["vlmevalkit", "vlmevalkit-2024", "lmms-eval"])
def test_api_failure_gives_no_letter_but_its_words_can_be_an_option(rule: str) -> None:
    options = {"A": "a cat that sleeps", "B": "a dog"}
    assert EXTRACTORS[rule]("Failed to obtain answer via API. The answer is A", options) is None
    assert EXTRACTORS[rule]("Failed to obtain answer via API. B.", options) is None
    assert EXTRACTORS[rule]("Failed to obtain answer via API. A (a dog)", options) == "B"
    assert EXTRACTORS[rule]("Failed to obtain answer via API", {"A": "the answer", "B": "via API"}) == "B"


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("dog", "B"),  # the text of an option
        ("A dog", "A"),  # a bare letter, which the extractor reads too
        ("There is A dog in it", "B"),  # its text, where the extractor takes the article
        ("C: it is the bird, not a dog", "C"),  # two texts, but a letter with a mark
        ("cat or dog, so (D)", "D"),
        ("`C`", "C"),  # only the extractor reads the rest
        ("\u9009D", "D"),
        ("E", "E"),  # never a gold letter, so wrong without asking the extractor
        ("none of them", None),
    ],
)
def test_static_rule_asks_the_extractor_last(prediction: str, letter: str | None) -> None:
    options = {"A": "cat", "B": "dog", "C": "bird", "D": "fish"}
    assert lmms_eval_static(prediction, options) == letter


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("answer is B and so on and on", "B"),
        ("The ANSWER\n is \t**b** and so on and on", "B"),
        ("the answer is ***B and so on and on", "B"),
        ("the answer is Because of so many things", "B"),  # the first letter of a word is one as well
        ("The answer is ** B ** because of so many things", None),
        ("The answer isB because of so many things", None),
        ("The answer is: B because of so many things", None),
        ("The answer is (B) because of so many things", None),
        ("Theansweris B because of so many things", None),
        ("The answer is D because of so many things", None),  # which is no option
    ],
)
def test_stated_letter_needs_spaces_then_stars_then_the_letter(prediction: str, letter: str | None) -> None:
    assert vlmevalkit(prediction, {"A": "cat", "B": "dog"}) == letter


def test_an_answer_of_100_kb_is_read_quickly_and_whole() -> None:
    text = "word " * 20_000
    assert vlmevalkit(f"{text}B", OPTIONS) == "B"
    assert vlmevalkit(f"B {text}", OPTIONS) is None
    assert lmms_eval_extractor(f"{text}B", OPTIONS) == lmms_eval_static(f"{text}B", OPTIONS) == "B"


@pytest.mark.parametrize("text", ["\u0410", "\u0412.", "\uff21", "\uff08\uff22\uff09", "(\u0395)", "\u24b7"])
def test_lookalike_letters_are_seen_but_never_chosen(text: str) -> None:
    assert is_lookalike(text)
    assert all(rule(text, OPTIONS) is None for rule in EXTRACTORS.values())


@pytest.mark.parametrize("text", ["A", "B.", "", "\u72d7", "\u0410\u0412", "B\u3002"])
def test_what_is_no_lookalike(text: str) -> None:
    assert not is_lookalike(text)


@pytest.mark.parametrize(("prediction", "gold"), [("Option C", "c"), ("the answer is\nc", "C"), (" (c) three", "C")])
def test_mmstar_rule_normalises(prediction: str, gold: str) -> None:
    assert is_right(prediction, gold)
