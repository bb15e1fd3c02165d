"""What pandas makes of a cell, for the rules of VLMEvalKit, which reads its questions and predictions with pandas.

The project's own reader keeps every text. VLMEvalKit loses an option that reads "NA", and compares a prediction that
reads "None" as "nan"; a score by its rule has to lose the same.
"""

from collections.abc import Mapping
from string import ascii_uppercase

MISSING = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA")
    + ("NULL", "NaN", "None", "n/a", "nan", "null")
)
"""The cells that pandas reads as missing by default; "none" and " NA" are texts."""


def cell_as_text(cell: str) -> str:
    """A cell as text after pandas read it, where a missing one is "nan"."""
    return "nan" if cell in MISSING else cell


def options_that_stay(cells: Mapping[str, str]) -> dict[str, str]:
    """The options, by letter, that pandas reads from the one-letter columns of a row."""
    return {letter: cells[letter] for letter in ascii_uppercase if cells.get(letter, "") not in MISSING}
