"""Which option a free-text answer chose.

The rule is the exact-matching part of VLMEvalKit (open-compass) as of 2026-08; earlier versions accepted a letter
anywhere in the answer, so their scores are not comparable.
"""

import re
from collections.abc import Mapping

RULE = "vlmevalkit-2026-08-exact"

NO_CHOICE = "Z"
"""The letter of an answer that chose none of the options."""

_API_FAILURE = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"answer\s+is\s*\**\s*([A-D])", re.IGNORECASE)
_TAIL = 4


def extract_choice(prediction: str, options: Mapping[str, str]) -> str | None:
    """Find the chosen option of a multiple-choice answer.

    Args:
        prediction: the answer as the model wrote it.
        options: text of each option by its capital letter.

    Returns:
        A letter of ``options``, ``"Z"`` if the answer declines to choose, or None if the rule cannot tell (a judge may
        then be asked; without one it counts as ``"Z"``).
    """
    if _API_FAILURE in prediction:
        return None
    if any(phrase in prediction for phrase in _REFUSALS):
        return NO_CHOICE
    return _by_letter(prediction, options) or _by_text(prediction, options)


def _by_letter(prediction: str, options: Mapping[str, str]) -> str | None:
    tokens = prediction.translate(_SEPARATORS).split()
    letters = [letter for letter in options if letter in tokens]
    # A letter early in a long answer is more often an article or a quoted option than the choice.
    if len(letters) == 1 and tokens.index(letters[0]) >= len(tokens) - _TAIL:
        return letters[0]
    if not letters and NO_CHOICE in tokens:
        return NO_CHOICE
    stated = _ANSWER_IS.search(prediction)
    return stated[1].upper() if stated and stated[1].upper() in options else None


def _by_text(prediction: str, options: Mapping[str, str]) -> str | None:
    if len(prediction.lower()) > 2 * sum(len(text) for text in options.values()):
        return None
    named = [letter for letter, text in options.items() if text.lower() in prediction.lower()]
    return named[0] if len(named) == 1 else None
