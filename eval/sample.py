"""A question, a score, and the cells of a question's row: what reading, scoring and showing share."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from eval.reading.images import ImageSource
    from eval.reading.tables import Row

Id = int | str


@dataclass(frozen=True)
class Sample:
    """One question put to the model.

    Attributes:
        id: its id in the benchmark file.
        fields: its columns except the image.
        images: its images; empty when only answers are scored.
    """

    id: Id
    fields: Row
    images: tuple[ImageSource, ...] = ()


@dataclass
class Score:
    """The outcome of scoring, as it is written to the result file.

    Attributes:
        status: "scored"; "unscored" when gold answers or a judge are lacking; "incomplete" when a judge failed.
        rule: name of the scoring rule.
        score: the headline number as tables print it, up to the benchmark's `full_score` (100, but 2000 for MME);
            None unless the status is "scored".
        scores: all values that the benchmark's own code prints, in their unit and order.
        counts: the numbers of questions and answers behind the values, and of everything that was left out.
        notes: what a reader must know before using the number.
        judge: model and address of the judge that graded the answers, if one did.
        per_sample: right or wrong (or a grade from 0 to 1) of each question, by its id.
    """

    status: Literal["scored", "unscored", "incomplete"]
    rule: str
    score: float | None = None
    scores: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    judge: dict[str, Any] | None = None
    per_sample: dict[Id, bool | float] = field(default_factory=dict)


_TEXT = r"""[rRuU]?(?:'[^'\\\n]*(?:\\.[^'\\\n]*)*'|"[^"\\\n]*(?:\\.[^"\\\n]*)*")"""
_TEXTS = re.compile(rf"\s*\[\s*(?:(?:{_TEXT}|,)\s*)*\]\s*", re.DOTALL)
"""A list of texts as Python prints it; nothing else is given to Python's own reader, which deep nesting would end."""


def printed_texts(text: str) -> list[str] | None:
    """The texts of a list that Python printed; None if it is no such list."""
    if not _TEXTS.fullmatch(text):
        return None
    try:
        return list(ast.literal_eval(text.strip()))
    except (ValueError, SyntaxError):
        return None


def as_list(cell: Any) -> list[Any]:
    """A cell that holds a list, or a list as Python prints it; any other cell is a list with one item.

    `["a", "b"]` and `"['a', 'b']"` are the same; "" is the empty list, and "[1]" is a text, because the lists that
    benchmarks print hold texts.
    """
    if isinstance(cell, str) and cell[:1] == "[":
        written = printed_texts(cell)  # None for text that only starts with a bracket
        if written is not None:
            return written
    if isinstance(cell, list):
        return cell
    return [] if cell == "" else [cell]


def is_missing(text: str) -> bool:
    """Whether an option or hint cell means "none": empty, or the words nan/none as LLaVA reads them."""
    return text.strip().lower() in ("", "nan", "none")


def options(fields: Row, letters: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ") -> dict[str, str]:
    """The options of a sample, from its one-letter columns.

    Some files mark a missing option as "nan", others have options that read "None" or "nan". Such a word is taken for
    an option where the gold letter or a later option shows that it is one.
    """
    filled = {letter: fields[letter] for letter in letters if fields.get(letter, "").strip()}
    sure = [letter for letter, text in filled.items() if not is_missing(text) or letter == fields.get("answer")]
    return {letter: text for letter, text in filled.items() if sure and letter <= sure[-1]}


def listed_options(fields: Row) -> str:
    r"""Options A to D as LLaVA writes them: a line `A. text` each, up to the first missing one."""
    lines = ""
    for letter in "ABCD":
        if is_missing(fields.get(letter, "")):
            break
        lines += f"\n{letter}. {fields[letter]}"
    return lines
