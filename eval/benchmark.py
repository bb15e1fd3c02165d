"""What the runner and the scorer ask of a benchmark: read its questions, write prompts, score the answers."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any, ClassVar

import numpy as np

from eval.reading.images import ImageSource, row_images
from eval.reading.tables import Row, StoredText, read_rows
from eval.sample import Id, Sample, Score
from eval.scoring.headline import Headline, mean_headline
from eval.scoring.judge import Judge
from eval.scoring.vqa import normalise_answer
from llava_skip_base.errors import UserError, first_few

LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
SHORT_INSTRUCTION = "Answer the question using a single word or phrase."


TEXT_COLUMNS = frozenset(
    "index question_id questionid id pid question prompt text hint category l2_category split image_path imagename "
    "image_name image_id imageid image_source label type question_type answer_type answer_option precision unit query "
    "dataset dataset_name isbalanced subject ocr picture doc_id".split()
) | {*ascii_uppercase}
"""Columns of which every benchmark, where it reads them, takes texts; lists, objects or bytes there are refused."""
_NOT_TEXT = (list, dict, bytes)
LONGEST_ID = 1000
"""Digits of an id that is taken for a number."""


class Benchmark(ABC):
    """How to read, ask and score one benchmark.

    Attributes:
        name: the name on the command line.
        rules: scoring rules by the name on the command line, with the name and version for results; the first is the
            default.
        protocols: prompt protocols; the first is the default.
        max_new_tokens: the generation limit of the chosen protocol.
        limits: the generation limits of the protocols that differ from the default.
        embedded: its file in the embedded data set.
        columns: columns without which a file is not this benchmark.
        optional_columns: columns that a file may lack.
        list_columns: the ones of both that may hold lists.
        public_names: what public files call a column that `normalise` renames, for messages.
        id_columns: columns that may hold a row's id; the first one found does.
        answer_columns: columns that may hold the answers of a prediction file; the first one found does.
        full_score: the highest possible headline score.
        takes_judge_prompt: whether its judge can be given the official text in one piece.
        submission: name of the file that the benchmark's server or maintainers take, if there is one.
    """

    name: ClassVar[str]
    rules: ClassVar[Mapping[str, str]]
    protocols: ClassVar[tuple[str, ...]] = ("llava",)
    max_new_tokens: int
    limits: ClassVar[Mapping[str, int]] = {}
    embedded: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    optional_columns: ClassVar[tuple[str, ...]] = ()
    list_columns: ClassVar[frozenset[str]] = frozenset()
    public_names: ClassVar[Mapping[str, str]] = {}
    id_columns: ClassVar[tuple[str, ...]] = ("index", "question_id", "id")
    answer_columns: ClassVar[tuple[str, ...]] = ("prediction", "text")
    full_score: ClassVar[float] = 100.0
    takes_judge_prompt: ClassVar[bool] = False
    submission: ClassVar[str | None] = None

    def __init__(self, rule: str | None = None, protocol: str | None = None) -> None:
        """Choose how to score (a key of `rules`) and how to ask (one of `protocols`).

        Raises:
            UserError: an unknown name; it lists the known ones.
        """
        self.chosen_rule = self._choose("rule", rule, tuple(self.rules))
        self.chosen_protocol = self._choose("protocol", protocol, self.protocols)
        self.max_new_tokens = self.limits.get(self.chosen_protocol, self.max_new_tokens)

    def _choose(self, kind: str, name: str | None, names: tuple[str, ...]) -> str:
        if name is not None and name not in names:
            raise UserError(f"{self.name} has no {kind} '{name}'; choose one of {', '.join(names)}.")
        return name or names[0]

    @property
    def rule(self) -> str:
        """Name and version of the scoring rule, for results."""
        return self.rules[self.chosen_rule]

    def read(self, data: Path) -> list[Row]:
        """Read the rows of a benchmark file; benchmarks whose questions are in several files read their folder."""
        return read_rows(data)

    def read_predictions(self, path: Path) -> list[Row]:
        """Read the rows of a prediction file, or of a folder where that is what the official tools write."""
        return read_rows(path)

    def normalise(self, rows: list[Row]) -> list[Row]:
        """The rows of any public form with one set of columns; rows that have them already are not changed.

        They come from a benchmark file, or from a prediction file that repeats its columns.
        """
        return rows

    def image_folder(self, data: Path) -> Path:
        """The folder of image files that belongs to a benchmark file."""
        return (data if data.is_dir() else data.parent) / "images"

    def load(self, data: Path, images: Path | None = None, with_images: bool = True) -> list[Sample]:
        """Read a benchmark file.

        Args:
            data: the file in a public format.
            images: folder of image files; the one next to the data by default.
            with_images: False when only saved answers are scored.

        Raises:
            UserError: the file is not this benchmark's, or an image cannot be opened.
        """
        rows = self.read(data)
        self.check_texts(rows, str(data))
        rows = self.normalise(rows)
        self.check_columns(rows, str(data))
        samples = self.samples(rows)
        if not with_images:
            return samples
        shown = self.find_images(rows, images or self.image_folder(data))
        return [replace(sample, images=own) for sample, own in zip(samples, shown, strict=True)]

    def find_images(self, rows: list[Row], folder: Path) -> list[tuple[ImageSource, ...]]:
        """The images that the protocol shows with each normalised row; `folder` has the image files.

        Raises:
            UserError: naming the samples whose image is missing or broken.
        """
        return [(image,) for image in row_images(rows, folder)]

    def check_texts(self, rows: Sequence[Row], source: str) -> None:
        """Refuse rows, as they were read, that hold something else where benchmarks have texts."""
        odd = {name for row in rows for name, cell in row.items() if isinstance(cell, _NOT_TEXT)} & TEXT_COLUMNS
        self._refuse_nested(odd - self.list_columns, source)

    def _refuse_nested(self, columns: set[str], source: str) -> None:
        if columns:
            names = ", ".join(sorted(columns))
            raise UserError(f"{source}: the columns {names} hold images, lists or objects; expected texts.")

    def check_columns(self, rows: Sequence[Row], source: str) -> None:
        """Refuse rows that lack a column, saying which columns there are."""
        self.check_texts(rows, source)
        lacking = [name for name in self.columns if any(name not in row for row in rows)]
        if not any(name in rows[0] for name in self.id_columns):
            lacking.append(self.id_columns[0])
        if lacking:
            first = next((row for row in rows if any(name not in row for name in lacking)), rows[0])
            lacking = [self.public_names.get(name, name) for name in lacking]
            raise UserError(
                f"{source}: lacks the columns {', '.join(lacking)}, which {self.name} needs; a row has "
                f"{', '.join(first)}. Give a whole benchmark file (for saved predictions: with --data)."
            )
        own = {*self.columns, *self.optional_columns, *ascii_uppercase}
        nested = {name for row in rows for name, cell in row.items() if isinstance(cell, _NOT_TEXT)} & own
        images = {name for row in rows for name in nested if is_image(row.get(name))}
        self._refuse_nested(nested - self.list_columns | images, source)

    def samples(self, rows: Sequence[Row]) -> list[Sample]:
        """Turn normalised rows into samples without their images, in file order.

        Raises:
            UserError: an id occurs twice.
        """
        hidden = ("image", *self.answer_columns)
        samples = [
            Sample(
                self.row_id(row),
                {name: cell for name, cell in row.items() if name not in hidden and not is_image(cell)},
            )
            for row in rows
        ]
        refuse_doubles([sample.id for sample in samples], "the benchmark file")
        return samples

    def row_id(self, row: Row) -> Id:
        """A row's id: a number where it reads as one, else its text."""
        value = next((row[name] for name in self.id_columns if row.get(name, "") != ""), None)
        if value is None:
            raise UserError(
                f"a row has no id: expected a value in {' or '.join(self.id_columns)}, saw {first_few(list(row))}."
            )
        text = str(value).removesuffix(".0")
        return int(text) if text.isascii() and text.isdigit() and len(text) <= LONGEST_ID else text

    def question(self, id_: Id) -> Id:
        """The id of the question that a row asks, where several rows ask one question."""
        return id_

    def limit(self, samples: list[Sample], count: int) -> list[Sample]:
        """The first `count` questions."""
        return samples[:count]

    def check_whole(self, samples: Sequence[Sample], source: str) -> None:  # noqa: B027  most files cannot tell
        """Refuse the rows of a prediction file that show by themselves that others are lacking."""

    def score_graded(self, samples: Sequence[Sample], rows: Sequence[Row]) -> "Score | None":
        """Score rows of a prediction file that hold grades instead of answers; None if they do not."""
        return None

    def protocol(self, samples: Sequence[Sample]) -> str:
        """The prompt protocol that `prompts` follows for these samples."""
        return self.chosen_protocol

    @abstractmethod
    def prompts(self, samples: Sequence[Sample]) -> list[str]:
        """The prompt of each sample, without the image's placeholder."""

    @abstractmethod
    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str], judge: Judge | None = None) -> Score:
        """Score one answer for each sample.

        Args:
            samples: the questions with their gold answers.
            answers: text by sample id, complete.
            judge: a language model that grades, where the benchmark uses one.
        """

    def headline(
        self, samples: Sequence[Sample], answers: Mapping[Id, str], values: Mapping[str, bool | float]
    ) -> Headline:
        """The headline score as a function of sums over questions; the mean of `values` unless a benchmark has more.

        Args:
            samples: the questions, with texts as ids, as saved answers have them.
            answers: text by id.
            values: right or wrong (or a grade) of each question, see `Score.per_sample`, by its id as a text.
        """
        return mean_headline(list(values), np.array(list(values.values())))

    def reading(self, answer: str, fields: Row) -> str:
        """What an answer says: two answers agree if this is equal. The choice where there is one, else the words."""
        return normalise_answer(answer)

    def reports(self, score: Score, name: str) -> dict[str, str]:
        """Files that the official code writes about a score, next to the result: text by file name.

        Args:
            score: a score of this benchmark.
            name: of the model, or of the file with its predictions or grades.
        """
        return {}

    def predictions(self, rows: Sequence[Row], source: str, samples: Sequence[Sample]) -> dict[Id, str]:
        """Read the answers from the rows of a prediction file; `match` counts rows without one.

        Args:
            rows: rows of the file.
            source: the file, for messages.
            samples: the questions, for files with other ids.

        Raises:
            UserError: there is no column of answers, or an id occurs twice.
        """
        column = self.answer_column(rows, source)
        answered = [row for row in rows if column in row]
        ids = [self.row_id(row) for row in answered]
        refuse_doubles(ids, source)
        return {id_: str(row[column]) for id_, row in zip(ids, answered, strict=True)}

    def answer_column(self, rows: Sequence[Row], source: str) -> str:
        """The column that holds the answers of a prediction file.

        Raises:
            UserError: there is none.
        """
        column = next((name for name in self.answer_columns if any(name in row for row in rows)), None)
        if column is None:
            raise UserError(
                f"{source}: expected the answers in a column {' or '.join(self.answer_columns)}; "
                f"the first row has {', '.join(rows[0])}."
            )
        if column == "text" and "image" in rows[0] and "prompt" not in rows[0]:
            raise UserError(f"{source}: is a file of questions (image and text), not of answers; give the answers.")
        nested = [number for number, row in enumerate(rows, start=1) if isinstance(row.get(column), list | dict)]
        if nested:
            raise UserError(f"{source}: the answers of rows {first_few(nested)} are lists or objects; expected texts.")
        return column

    def write_submission(self, samples: Sequence[Sample], answers: Mapping[Id, str], path: Path) -> list[str]:
        """Write the answers, which must be complete, as the benchmark's server or maintainers take them.

        Returns:
            Notes for the reader.

        Raises:
            UserError: there is no such form, or the samples are not whole.
        """
        raise UserError(f"{self.name} has no submission file: it is scored here, with public gold answers.")


def refuse_doubles(ids: Sequence[Id], source: str) -> None:
    """Raise if an id occurs twice, because it is then unclear which row counts."""
    doubled = [id_ for id_, count in Counter(ids).items() if count > 1]
    if doubled:
        raise UserError(f"{source}: ids occur more than once: {first_few(doubled)}; remove the repeated rows.")


def match(
    samples: Sequence[Sample], predictions: Mapping[Id, str], allow_missing: bool = False
) -> tuple[dict[Id, str], dict[str, int], list[str]]:
    """Pair samples with predictions, counting what does not pair.

    Args:
        samples: the questions of the benchmark file.
        predictions: text by id.
        allow_missing: count an absent prediction as an empty answer instead of refusing.

    Returns:
        The answers (complete), counts, and notes to show.

    Raises:
        UserError: predictions are missing, or none belongs to the file.
    """
    ids = {sample.id for sample in samples}
    missing = [sample.id for sample in samples if sample.id not in predictions]
    unknown = [id_ for id_ in predictions if id_ not in ids]
    if len(missing) == len(samples):
        raise UserError(
            f"none of the {len(predictions)} prediction ids is in the benchmark file (predictions: "
            f"{first_few(list(predictions), 3)}; file: {first_few(list(ids), 3)}); give the file they were made from."
        )
    if missing and not allow_missing:
        raise UserError(
            f"{first_few(missing)} of {len(samples)} predictions are missing; finish the run, give the benchmark file "
            "that the predictions were made from, or use --allow-missing to count each as a wrong answer."
        )
    notes = []
    if missing:
        notes.append(f"{first_few(missing)} of {len(samples)} predictions are missing and count as wrong.")
    if unknown:
        notes.append(f"{first_few(unknown)} of {len(predictions)} predictions are not in the benchmark file: left out.")
    answers = {sample.id: predictions.get(sample.id, "") for sample in samples}
    return answers, {"missing": len(missing), "unknown": len(unknown)}, notes


def is_image(cell: Any) -> bool:
    """Whether a cell holds an image, which is no part of a sample's fields."""
    if isinstance(cell, list):
        return any(map(is_image, cell))
    if isinstance(cell, dict):
        return "bytes" in cell or any(map(is_image, cell.values()))
    return isinstance(cell, bytes | StoredText)
