"""Benchmarks whose score is the mean over their questions, and those of them that ask for the letter of an option."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any, ClassVar

from eval.benchmark import LETTER_INSTRUCTION, Benchmark
from eval.reading.tables import Row
from eval.sample import Id, Sample, Score, is_missing
from eval.scoring.extraction import vlmevalkit
from eval.scoring.judge import Judge
from eval.scoring.pandas_cells import cell_as_text, options_that_stay
from llava_skip_base.errors import UserError, first_few


class MeanBenchmark(Benchmark):
    """A benchmark whose headline is the mean of one value for each question, in percent.

    Attributes:
        gold: the column of the gold answers.
        numbers_rows: whether there are public files without ids, in which the number of a row is its id.
    """

    gold: ClassVar[str] = "answer"
    numbers_rows: ClassVar[bool] = False

    @abstractmethod
    def value(self, answer: str, fields: Row) -> bool | float:
        """Right or wrong, or a grade from 0 to 1, of an answer to the question with these columns."""

    def parts(self, fields: Row) -> Sequence[str]:
        """The parts of the benchmark, besides the whole, in whose means a question counts."""
        return ()

    def is_readable(self, answer: str, fields: Row) -> bool:
        """Whether the rule can read the answer at all; those that it cannot are counted."""
        return True

    def has_gold(self, sample: Sample) -> bool:
        """Whether the file has a gold answer to the question."""
        return bool(sample.fields.get(self.gold, ""))

    def identified(self, rows: Sequence[Row]) -> list[Row]:
        """Rows with an id: their own, or where the benchmark numbers rows and none has one, the number from 0."""
        if not self.numbers_rows or any(name in rows[0] for name in self.id_columns):
            return list(rows)
        return [{**row, "index": str(number)} for number, row in enumerate(rows)]

    def predictions(self, rows: Sequence[Row], source: str, samples: Sequence[Sample]) -> dict[Id, str]:
        """Read the answers, under the ids that `identified` gives."""
        return super().predictions(self.identified(rows), source, samples)

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Average over all questions and over each part; a file without any gold answer is not scored."""
        counts: dict[str, Any] = {
            "questions": len(samples),
            "empty": sum(not answers[s.id].strip() for s in samples),
        }
        lacking = [s.id for s in samples if not self.has_gold(s)]
        if len(lacking) == len(samples):
            note = f"none of the {len(samples)} questions has a gold answer (a test split?), so nothing is scored here."
            if self.submission:
                note += f" 'llava-skip score ... --submission {self.submission}' writes what the server takes."
            return Score("unscored", self.rule, counts=counts, notes=[note])
        if lacking:
            raise UserError(
                f"{first_few(lacking)} of {len(samples)} questions have no gold answer; give a split that has them all."
            )
        values = {s.id: self.value(answers[s.id], s.fields) for s in samples}
        scores = self.means(samples, values)
        counts["unreadable"] = sum(not self.is_readable(answers[s.id], s.fields) for s in samples)
        notes = []
        if counts["unreadable"]:
            notes.append(f"{counts['unreadable']} of {len(samples)} answers cannot be read by this rule and are wrong.")
        headline = next(iter(scores.values()))
        return Score("scored", self.rule, headline, scores, counts, notes, per_sample=values)

    def means(self, samples: Sequence[Sample], values: Mapping[Id, bool | float]) -> dict[str, float]:
        """The mean over all questions first, then those of the parts, in percent."""
        found: dict[str, list[float]] = defaultdict(list)
        for sample in samples:
            for part in ("accuracy", *self.parts(sample.fields)):
                found[part].append(values[sample.id])
        in_order = sorted(found, key=lambda part: (part != "accuracy", part))
        return {part: 100 * sum(found[part]) / len(found[part]) for part in in_order}


class LetterBenchmark(MeanBenchmark):
    """A benchmark of options in one-letter columns, whose gold answer is a letter."""

    @abstractmethod
    def letter(self, answer: str, fields: Row) -> str | None:
        """The letter that an answer names by the chosen rule; None if it names none."""

    def value(self, answer: str, fields: Row) -> bool:
        """Whether the answer names the gold letter."""
        return self.letter(answer, fields) == fields[self.gold].strip()

    def is_readable(self, answer: str, fields: Row) -> bool:
        """Whether the answer names a letter."""
        return self.letter(answer, fields) is not None

    def reading(self, answer: str, fields: Row) -> str:
        """The letter, else the answer's words."""
        return self.letter(answer, fields) or super().reading(answer, fields)

    def has_gold(self, sample: Sample) -> bool:
        """Whether the file has the gold letter."""
        return not is_missing(sample.fields.get(self.gold, ""))


def vlmevalkit_letter(answer: str, fields: Row) -> str | None:
    """The letter that VLMEvalKit reads in an answer, with the options that pandas leaves in the row."""
    return vlmevalkit(cell_as_text(answer), options_that_stay(fields))


def lettered_question(fields: Row) -> str:
    """The question, a line `A. text` for each option, and the letter instruction."""
    lines = "".join(f"\n{letter}. {text}" for letter, text in given_options(fields).items())
    return f"{fields['question']}{lines}\n{LETTER_INSTRUCTION}"


def given_options(fields: Row) -> dict[str, str]:
    """The options of a row by letter. One that reads "None" is an option: these files leave a missing one empty."""
    return {letter: fields[letter] for letter in ascii_uppercase if fields.get(letter, "").strip()}


def option_columns(choices: Sequence[object]) -> dict[str, str]:
    """The options of a list by letter, as the columns of a row."""
    if len(choices) > len(ascii_uppercase):
        raise UserError(f"a question has {len(choices)} options; expected at most {len(ascii_uppercase)}.")
    return {letter: str(choice) for letter, choice in zip(ascii_uppercase, choices, strict=False)}


def numbered_letter(answer: str) -> str:
    """The letter of an option given by its number from 0; a letter stays what it is."""
    text = answer.strip()
    return (
        ascii_uppercase[int(text)] if text.isascii() and text.isdigit() and len(text) < 3 and int(text) < 26 else text
    )
