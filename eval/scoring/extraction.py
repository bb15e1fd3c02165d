"""Which option a free-text answer chose, by the rules that published numbers were made with.

A rule takes the answer and the text of each option by its capital letter. It returns a letter, ``"Z"`` if the answer
chooses no option, or None if the rule cannot tell (a judge may then be asked; without one the answer is wrong). The
rules differ by points on the same answers, so every score holds the name and version of its rule.

Sources: open-compass/VLMEvalKit ``matching_util.py``, EvolvingLMMs-Lab/lmms-eval ``mmbench_evals.py`` and
``mcq_extract.py``.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping

NO_CHOICE = "Z"
"""The letter of an answer that chose none of the options."""

Options = Mapping[str, str]

_API_FAILURE = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([A-D])", re.IGNORECASE)
_TAIL = 4

# lmms-eval: what may be written around a letter, tried in this order.
_AFFIXES = (
    *(("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ").")),
    *((":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")),
)
_ENGLISH_PHRASES = tuple(
    f"{lead}{noun} is"
    for noun, leads in {
        "answer": ("the ", "", "the correct ", "correct ", "the best ", "best ", "my "),
        "option": ("the correct ", "correct ", "the best ", "best "),
        "choice": ("the ", "", "the correct ", "correct ", "my "),
    }.items()
    for lead in leads
)
_PHRASES = (
    *_ENGLISH_PHRASES,
    *("i choose", "i select", "i pick", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)

# Capital letters of other alphabets that look like an option letter.
_LOOKALIKES = str.maketrans("АВСЕНІΑΒΕΗΙ", "ABCEHIABEHI")


def vlmevalkit(prediction: str, options: Options) -> str | None:
    """Follow VLMEvalKit as of 2026-08: one letter among the last four words, or "answer is X", or one option's text."""
    letter = _letter_of_words(prediction, options, _TAIL)
    stated = None if letter or _API_FAILURE in prediction else _ANSWER_IS.search(prediction)
    if stated and stated[1].upper() in options:
        return stated[1].upper()
    if letter is None and len(prediction) <= 2 * sum(len(text) for text in options.values()):
        letter = _letter_of_text(prediction, options)
    return letter


def vlmevalkit_2024(prediction: str, options: Options) -> str | None:
    """Follow VLMEvalKit from 2024-01 to 2025-07: one letter anywhere, or one option's text."""
    return _letter_of_words(prediction, options) or _letter_of_text(prediction, options)


def lmms_eval(prediction: str, options: Options) -> str | None:
    """Follow lmms-eval's MMBench: a bare letter A to E, then a letter with one affix, or the text of A to D."""
    prediction = prediction.strip()
    texts = {letter: options[letter] for letter in "ABCD" if letter in options}
    words = [] if _API_FAILURE in prediction else prediction.split()
    bare = [letter for letter in "ABCDE" if letter in words]
    # "A" in a longer answer may be the article, which keeps any bare letter from counting.
    if len(bare) == 1 and not ("A" in words and len(words) > 3):
        return bare[0]
    for before, after in _AFFIXES:
        fixed = [letter for letter in "ABCDE" if f"{before}{letter}{after}" in words]
        if len(fixed) == 1:
            return fixed[0]
    return _letter_of_text(prediction, texts)


def lmms_eval_static(prediction: str, options: Options) -> str | None:
    """Follow lmms-eval's MMBench without a judge: its MMBench rule, and where that finds nothing its extractor."""
    letters = [letter for letter in "ABCD" if letter in options]
    return lmms_eval(prediction, options) or lmms_eval_extractor(prediction, letters)


def lmms_eval_extractor(prediction: str, letters: Iterable[str]) -> str | None:
    """Follow lmms-eval's regular-expression extractor (2026-08): the best of several forms, then the last of its kind.

    Args:
        prediction: the answer.
        letters: the letters of the options, in alphabetical order; their texts do not matter.
    """
    text = prediction.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    if not text:
        return None
    padded = f" {text} "
    letters = list(letters)
    found = [candidate for letter in letters for candidate in _forms(letter, text.strip(), padded)]
    if not found:
        found = [(0, padded.rfind(letter), letter) for letter in letters if letter in padded]
    # The letters are in order and max() keeps the first of equals, as a stable sort does.
    return max(found, key=lambda candidate: candidate[:2])[2] if found else None


EXTRACTORS: dict[str, Callable[[str, Options], str | None]] = {
    "vlmevalkit": vlmevalkit,
    "vlmevalkit-2024": vlmevalkit_2024,
    "lmms-eval": lmms_eval,
    "lmms-eval-static": lmms_eval_static,
}
VERSIONS = {
    "vlmevalkit": "vlmevalkit-2026-08",
    "vlmevalkit-2024": "vlmevalkit-2024-01-to-2025-07",
    "lmms-eval": "lmms-eval-2026-08",
    "lmms-eval-static": "lmms-eval-static-2026-08",
}


def is_lookalike(prediction: str) -> bool:
    """Tell whether an answer is a single letter that only looks like an option letter, such as Cyrillic "А".

    No published rule accepts one, so it counts as no choice; a reader should know that there are such answers.
    """
    text = prediction.translate(_SEPARATORS).strip()
    plain = unicodedata.normalize("NFKC", text).translate(_LOOKALIKES).strip("() ")
    return not text.isascii() and len(plain) == 1 and "A" <= plain <= "Z"


def _letter_of_words(prediction: str, options: Options, tail: int | None = None) -> str | None:
    if _API_FAILURE in prediction:
        return None  # the text of an option can still be found in it
    if any(phrase in prediction for phrase in _REFUSALS):
        return NO_CHOICE
    words = prediction.translate(_SEPARATORS).split()
    letters = [letter for letter in options if letter in words]
    # A letter early in a long answer is more often an article or a quoted option than the choice.
    if len(letters) == 1 and (tail is None or words.index(letters[0]) >= len(words) - tail):
        return letters[0]
    return NO_CHOICE if not letters and NO_CHOICE in words else None


def _letter_of_text(prediction: str, options: Options) -> str | None:
    named = [letter for letter, text in options.items() if text.lower() in prediction.lower()]
    return named[0] if len(named) == 1 else None


def _forms(letter: str, text: str, padded: str) -> list[tuple[int, int, str]]:
    """List the forms in which a letter occurs as (priority, position, letter)."""
    written = {6: f"({letter})", 5: f"{letter}.", 4: f"{letter}:", 3: f"{letter})", 2: f"{letter} "}
    found = [(priority, padded.rfind(form), letter) for priority, form in written.items() if form in padded]
    for phrase in _PHRASES:
        start = padded.lower().find(phrase)
        position = padded.find(letter, start + len(phrase)) if start >= 0 else -1
        if position >= 0:
            found.append((7, position, letter))
    if text.startswith(letter) and not text[1:2].isalpha():
        found.append((10, 0, letter))
    if text.endswith(letter) and not text[-2:-1].isalpha():
        found.append((9, len(padded) - 1, letter))
    return found
