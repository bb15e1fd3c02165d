"""What the runner and the scorer ask of a benchmark: load its records, word a prompt, score the answers."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from eval.errors import EvalError, some
from eval.images import Picture, row_pictures
from eval.judge import Judge
from eval.tables import Row, read_rows

Id = int | str
LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
ID_COLUMNS = ("index", "question_id", "id")
PREDICTION_COLUMNS = ("prediction", "text")


@dataclass(frozen=True)
class Sample:
    """One question put to the model.

    Attributes:
        id: the record's id in the benchmark file.
        fields: the record's columns except its picture.
        images: its pictures; empty when only answers are scored.
    """

    id: Id
    fields: Row
    images: tuple[Picture, ...] = ()


@dataclass
class Score:
    """The outcome of scoring, as it is written to the result file.

    Attributes:
        status: "scored"; "unscored" when gold answers or a judge are lacking; "incomplete" when a judge broke off.
        rule: name of the scoring rule.
        score: the headline number, 0 to 100 as tables print it; None unless the status is "scored".
        scores: all values of the benchmark's own report, in its own unit and order.
        counts: how many of what the values stand for, and everything that was left out.
        notes: what a reader must know before using the number.
        judge: model and address of the judge that graded the answers, if one did.
    """

    status: Literal["scored", "unscored", "incomplete"]
    rule: str
    score: float | None = None
    scores: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    judge: dict[str, Any] | None = None


class Benchmark(ABC):
    """A benchmark as data and four questions about it.

    Attributes:
        name: the name on the command line.
        rule: name of the scoring rule, with its version.
        max_new_tokens: the generation limit of the protocol.
        embedded: its file in the embedded data set.
        columns: columns without which a file is not this benchmark.
    """

    name: ClassVar[str]
    rule: ClassVar[str]
    max_new_tokens: ClassVar[int]
    embedded: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]

    def load(self, data: Path, images: Path | None = None, with_images: bool = True) -> list[Sample]:
        """Read a benchmark file.

        Args:
            data: the file in a public format.
            images: folder of image files; beside the data by default.
            with_images: False when only saved answers are scored.

        Raises:
            EvalError: if the file is not this benchmark's or a picture cannot be opened.
        """
        rows = read_rows(data)
        self.check_columns(rows, str(data))
        samples = self.samples(rows)
        if not with_images:
            return samples
        pictures = row_pictures(rows, images or data.parent / "images")
        return [replace(sample, images=(picture,)) for sample, picture in zip(samples, pictures, strict=True)]

    def check_columns(self, rows: Sequence[Row], source: str) -> None:
        """Refuse rows that lack a column, saying which columns there are.

        Args:
            rows: rows of one file.
            source: the file, for the message.
        """
        lacking = [name for name in self.columns if any(name not in row for row in rows)]
        if not any(name in rows[0] for name in ID_COLUMNS):
            lacking.append("index")
        if lacking:
            raise EvalError(
                f"{source}: lacks the columns {', '.join(lacking)}, which {self.name} needs; it has "
                f"{', '.join(rows[0])}. Give a whole benchmark file (for saved predictions: with --data)."
            )

    def samples(self, rows: Sequence[Row]) -> list[Sample]:
        """Turn rows into samples without their pictures, in file order.

        Args:
            rows: rows of a benchmark file, or of a prediction file that repeats its columns.

        Raises:
            EvalError: if an id occurs twice.
        """
        samples = [
            Sample(
                self.row_id(row),
                {name: cell for name, cell in row.items() if name not in ("image", *PREDICTION_COLUMNS)},
            )
            for row in rows
        ]
        refuse_doubles([sample.id for sample in samples], "the benchmark file")
        return samples

    def row_id(self, row: Row) -> Id:
        """Return a row's id: a number where it reads as one, else its text."""
        value = next((row[name] for name in ID_COLUMNS if row.get(name, "") != ""), None)
        if value is None:
            raise EvalError(f"a row has no id: expected a value in {' or '.join(ID_COLUMNS)}, saw {some(list(row))}.")
        text = str(value).removesuffix(".0")
        return int(text) if text.isascii() and text.isdigit() else text

    def limit(self, samples: list[Sample], count: int) -> list[Sample]:
        """Keep the first ``count`` questions."""
        return samples[:count]

    def check_whole(self, samples: Sequence[Sample], source: str) -> None:  # noqa: B027  most files cannot tell
        """Refuse a prediction file that shows by itself that rows are lacking.

        Args:
            samples: its rows.
            source: the file, for the message.
        """

    def score_graded(self, samples: Sequence[Sample], rows: Sequence[Row]) -> "Score | None":
        """Score rows that carry grades instead of answers; None if they do not.

        Args:
            samples: the questions.
            rows: rows of a prediction file.
        """
        return None

    @abstractmethod
    def protocol(self, samples: Sequence[Sample]) -> str:
        """Name the prompt protocol that ``prompts`` follows for these samples."""

    @abstractmethod
    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """Word the prompt of each sample, without the picture's placeholder."""

    @abstractmethod
    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Score one answer for each sample.

        Args:
            samples: the questions with their gold answers.
            answers: text by sample id, complete.
            judge: a language model that grades, where the benchmark has one.
        """

    def predictions(self, rows: Sequence[Row], source: str) -> dict[Id, str]:
        """Read the answers from the rows of a prediction file (``prediction`` or, as LLaVA writes it, ``text``).

        Args:
            rows: rows of the file.
            source: the file, for messages.

        Raises:
            EvalError: if there is no such column, or an id occurs twice.
        """
        column = next((name for name in PREDICTION_COLUMNS if name in rows[0]), None)
        if column is None or any(column not in row for row in rows):
            raise EvalError(
                f"{source}: expected the answers in a column {' or '.join(PREDICTION_COLUMNS)} of every row; "
                f"the first row has {', '.join(rows[0])}."
            )
        ids = [self.row_id(row) for row in rows]
        refuse_doubles(ids, source)
        return {id_: str(row[column]) for id_, row in zip(ids, rows, strict=True)}


def refuse_doubles(ids: Sequence[Id], source: str) -> None:
    """Raise if an id occurs twice, because it is then unclear which record counts."""
    doubled = [id_ for id_, count in Counter(ids).items() if count > 1]
    if doubled:
        raise EvalError(f"{source}: ids occur more than once: {some(doubled)}; remove the repeated rows.")


def match(
    samples: Sequence[Sample], predictions: Mapping[Id, str], allow_missing: bool = False
) -> tuple[dict[Id, str], dict[str, int], list[str]]:
    """Pair samples with predictions, counting what does not pair.

    Args:
        samples: the questions of the benchmark file.
        predictions: text by id.
        allow_missing: let an absent prediction count as an empty answer instead of refusing.

    Returns:
        The answers (complete), counts, and notes to show.

    Raises:
        EvalError: if predictions are missing, or none belongs to the file.
    """
    ids = {sample.id for sample in samples}
    missing = [sample.id for sample in samples if sample.id not in predictions]
    unknown = [id_ for id_ in predictions if id_ not in ids]
    if len(missing) == len(samples):
        raise EvalError(
            f"none of the {len(predictions)} prediction ids is in the benchmark file (predictions: "
            f"{some(list(predictions), 3)}; file: {some(list(ids), 3)}); give the file they were made from."
        )
    if missing and not allow_missing:
        raise EvalError(
            f"{some(missing)} of {len(samples)} predictions are missing; finish the run, give the benchmark file that "
            "the predictions were made from, or use --allow-missing to count each as a wrong answer."
        )
    notes = []
    if missing:
        notes.append(f"{some(missing)} of {len(samples)} predictions are missing and count as wrong.")
    if unknown:
        notes.append(f"{some(unknown)} of {len(predictions)} predictions are not in the benchmark file: left out.")
    answers = {sample.id: predictions.get(sample.id, "") for sample in samples}
    return answers, {"missing": len(missing), "unknown": len(unknown)}, notes


def is_missing(text: str) -> bool:
    """Tell whether an option or hint cell means "none": empty, or the words nan/none as LLaVA reads them."""
    return text.strip().lower() in ("", "nan", "none")


def options(fields: Row, letters: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ") -> dict[str, str]:
    """Collect the options of a record from its one-letter columns.

    Args:
        fields: the record.
        letters: the columns to look at.
    """
    return {letter: fields[letter] for letter in letters if not is_missing(fields.get(letter, ""))}


def listed_options(fields: Row) -> str:
    r"""Write options A to D as LLaVA does: a line ``A. text`` each, up to the first missing one."""
    lines = ""
    for letter in "ABCD":
        if is_missing(fields.get(letter, "")):
            break
        lines += f"\n{letter}. {fields[letter]}"
    return lines
