"""How VLMEvalKit and lmms-eval read answers to MMMU's questions, which differs from MMMU's own code.

Sources: open-compass/VLMEvalKit ``multiple_choice.py`` (``MMMU_preproc``), EvolvingLMMs-Lab/lmms-eval
``mmmu_mcq_utils.py`` and ``mmmu/utils.py``.
"""

from collections.abc import Mapping
from string import ascii_uppercase

from eval.reading.tables import Row
from eval.scoring.extraction import NO_CHOICE, vlmevalkit
from eval.scoring.pandas_cells import MISSING, cell_as_text, options_that_stay

OTHER = "Other Answers"


def is_right_vlmevalkit(prediction: str, fields: Row) -> bool:
    """Whether an answer is right by VLMEvalKit's rule, which makes every question a choice of letters."""
    choices, gold = vlmevalkit_question(fields)
    # An answer that names no option counts as the letter of none, which is the gold letter of an open question "Z".
    return (vlmevalkit(cell_as_text(prediction), choices) or NO_CHOICE) == gold


def vlmevalkit_question(fields: Row) -> tuple[dict[str, str], str]:
    """The options and the gold letter that VLMEvalKit gives a question.

    A question without option A becomes a choice between its gold answer (A) and other answers (B). Its gold letter is
    A, but a gold answer that is one capital letter stays the gold letter itself.
    """
    written = str(fields["answer_cell"])
    choices = options_that_stay(fields) or options_that_stay(fields["options"])
    if "A" not in choices:
        choices |= {} if written in MISSING else {"A": written}
        choices["B"] = OTHER
    return choices, written if len(written) == 1 and written in ascii_uppercase else "A"


def lmms_eval_letter(response: str, choices: Mapping[str, str]) -> str | None:
    """The option that a response names by lmms-eval's rule.

    It is named by `(A)`, else by a word that ends in the letter, else by `A.`, else in a long response by its text.

    Args:
        response: what the model wrote.
        choices: text by letter; empty where the file has no options, and then the response has to be the letter.

    Returns:
        The letter; of several the one that comes last; None if no option is named.
    """
    if not choices:
        return response
    for mark in ",.!?;:'":
        response = response.strip(mark)
    padded = f" {response} "
    # What shows that a letter is named, and what its place is told by: the last two look for the letter alone.
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        named = [letter for letter in choices if form.format(letter) in padded]
        if named:
            return max(named, key=lambda letter: padded.rfind(place.format(letter)))
    if len(padded.split()) <= 5:
        return None
    positions = {letter: padded.lower().rfind(text.lower()) for letter, text in choices.items()}
    last = max(positions, key=lambda letter: positions[letter])
    return last if positions[last] >= 0 else None
