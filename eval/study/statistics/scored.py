"""A result as numbers that can be resampled: values and score of each question, and the image that it is about."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from eval.benchmark import Benchmark
from eval.benchmarks import BENCHMARKS, get_benchmark
from eval.reading.images import image_keys
from eval.reading.tables import Row
from eval.sample import Sample
from eval.scoring.headline import Headline, mean_headline
from eval.scoring.intervals import FEW_CLUSTERS, Interval, bootstrap, headline_interval, interval, numbered
from eval.showing.results import IMAGES, Result
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json

IMAGE_FIELDS = ("image_path", "imagename", "image_id", "imageid", "image_source", "image_name", "picture")
"""Columns that name a question's image; the first one found does."""
OWN_COLUMNS = ("index", "prompt", "prediction")
"""What a line of ``answers.jsonl`` has besides the question's fields."""
ROUNDED = 0.06
"""Points by which a score that a rule rounds can differ from the one that is resampled."""


@dataclass(frozen=True)
class Scored:
    """A scored result.

    Attributes:
        result: it.
        headline: its score as a function of sums over questions.
        keys: which image each question is about, by the ids of questions and rows; None if that is not known.
        notes: what a reader of its intervals must know.
    """

    result: Result
    headline: Headline
    keys: dict[str, str] | None
    notes: tuple[str, ...]

    @cached_property
    def ids(self) -> list[str]:
        """The scored questions."""
        return list(self.result.values)

    @cached_property
    def clusters(self) -> np.ndarray | None:
        """The number of the image of each question of `ids`; None if no two are known to share one."""
        return clusters_of(self.ids, self.keys)

    def values(self, ids: Sequence[str]) -> np.ndarray:
        """Right or wrong, or grades, of the questions `ids`."""
        return np.array([self.result.values[id_] for id_ in ids])

    @cached_property
    def draws(self) -> np.ndarray:
        """The score on resamples of the images."""
        return bootstrap(self.headline.of(self.ids), self.headline.function, self.clusters)

    def interval(self) -> Interval:
        """The score, as the benchmark has it, and its interval."""
        return interval(self.headline.value, self.draws)

    def mean(self) -> Interval:
        """The mean over questions in percent, and its interval."""
        return headline_interval(mean_headline(self.ids, self.values(self.ids)), self.clusters)


def same_headlines(group: Sequence[Scored]) -> list[Headline]:
    """The headlines of results of one benchmark; their means over questions, if not all are sums of one kind."""
    headlines = [own.headline for own in group]
    kinds = {(frozenset(headline.ids), headline.parts.shape[1]) for headline in headlines}
    return headlines if len(kinds) == 1 else [mean_headline(own.ids, own.values(own.ids)) for own in group]


def drawn_units(ids: Iterable[str], keys: dict[str, str] | None) -> list[str] | None:
    """What each of `ids` is resampled with: its image, or itself if it has none, which `keys` then lacks.

    None if `keys` has none of them: then it is not known what they are about.
    """
    if not keys or not any(id_ in keys for id_ in ids):
        return None
    return [keys.get(id_, f"no image: {id_}") for id_ in ids]


def clusters_of(ids: Sequence[str], keys: dict[str, str] | None) -> np.ndarray | None:
    """The number of the image of each of `ids`; None if it is not known, or if each has an image of its own."""
    units = drawn_units(ids, keys)
    if units is None:
        return None
    clusters = numbered(units)
    return clusters if len(set(clusters.tolist())) < len(ids) else None


def load_scored(result: Result, keys: dict[str, str] | None = None) -> Scored:
    """Read what the intervals of a result need.

    Args:
        result: of an evaluation.
        keys: the images of its questions, if a result of the same file has given them already.

    Raises:
        UserError: it holds no scored question.
    """
    refuse_unscored(result)
    notes = []
    headline = _headline(result)
    if headline is None:
        headline = mean_headline(list(result.values), np.array(list(result.values.values())))
        if not _is_score(headline, result):
            notes.append(f"{result.folder}: the score cannot be resampled from its files; the interval is of the mean.")
    keys = find_keys(result) if keys is None else keys
    units = drawn_units(result.values, keys)
    if units is None:
        keys = None
        notes.append(
            f"{result.benchmark}: it is not known which questions share an image, so questions were resampled one by "
            "one; if some do, the intervals are too narrow."
        )
    count = len(set(units or result.values))
    if count < FEW_CLUSTERS:
        unit = "images" if keys else "questions"
        notes.append(f"{result.benchmark}: {count} {unit} are few, so the intervals are too narrow.")
    return Scored(result, headline, keys, tuple(notes))


def load_group(results: Sequence[Result]) -> list[Scored]:
    """Read several results of one benchmark file, whose images are looked for once."""
    first = load_scored(results[0])
    return [first, *(load_scored(result, first.keys or {}) for result in results[1:])]


def refuse_unscored(result: Result) -> None:
    """Raise UserError if a result holds no scored question."""
    if result.facts["status"] != "scored" or not result.values:
        raise UserError(f"{result.folder}: is {result.facts['status']}, so there is nothing to compare; score it.")


def score_interval(result: Result) -> Interval:
    """The score of a result and its interval, with questions about one image drawn together.

    Raises:
        UserError: it holds no scored question.
    """
    return load_scored(result).interval()


def find_keys(result: Result) -> dict[str, str] | None:
    """Which image each question of a result is about, by the id of its rows; None if that cannot be told.

    Results have it in ``images.json``. For those of earlier versions it comes from the benchmark file, if that has not
    changed, or from a column of it that names the image.
    """
    path = result.folder / IMAGES
    if path.is_file():
        found = read_json(path)
        if isinstance(found, dict) and found and all(isinstance(key, str) for key in found.values()):
            return found
    try:
        return image_keys(result.load_samples(get_benchmark(result.benchmark))) or None
    except UserError:
        return _named_images(result)


def read_answers(result: Result) -> tuple[Benchmark, list[Row]] | None:
    """The benchmark with the rule of a result, and its answers with their questions; None if they are not complete."""
    rule = result.facts["rule"].removesuffix("+judge")
    names = [name for name, version in BENCHMARKS[result.benchmark].rules.items() if version == rule]
    path = result.folder / "answers.jsonl"
    if not names or not path.is_file():
        return None
    benchmark = get_benchmark(result.benchmark, names[0])
    try:
        rows = result.answers()
        benchmark.check_columns(rows, str(path))
    except UserError:
        return None
    return benchmark, rows


def question_fields(row: Row) -> dict[str, Any]:
    """The columns of a line of answers that the question brought."""
    return {name: cell for name, cell in row.items() if name not in OWN_COLUMNS}


def _headline(result: Result) -> Headline | None:
    found = read_answers(result)
    if found is None:
        return None
    benchmark, rows = found
    if result.values.keys() - {row["index"] for row in rows}:
        return None
    samples = [Sample(row["index"], question_fields(row)) for row in rows]
    headline = benchmark.headline(samples, {row["index"]: row["prediction"] for row in rows}, result.values)
    return headline if _is_score(headline, result) else None


def _is_score(headline: Headline, result: Result) -> bool:
    score = result.facts["score"]
    return score is not None and abs(headline.value - score) <= ROUNDED


def _named_images(result: Result) -> dict[str, str] | None:
    try:
        rows = result.answers()
    except UserError:  # there are none, or they are damaged: nothing else of a comparison needs them
        return None
    keys = {}
    for row in rows:
        name = next((str(row[field]) for field in IMAGE_FIELDS if row.get(field)), None)
        if name is None:
            return None
        keys[row["index"]] = f"{row.get('category')}/{name}" if not row.get("image_path") and "picture" in row else name
    return keys or None
