"""A benchmark's score as a function of sums over its questions, which is what resampling needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Function = Callable[[np.ndarray], np.ndarray]
"""Sums over questions [..., parts] to scores [...]."""


@dataclass(frozen=True)
class Headline:
    """A score as a function of sums over questions.

    Attributes:
        ids: the questions, as the keys of ``per_sample.json``.
        parts: what each question adds to the sums [questions, parts].
        function: sums [..., parts] to scores [...]; NaN where a score is not defined, such as that of no questions.
    """

    ids: tuple[str, ...]
    parts: np.ndarray
    function: Function

    @property
    def value(self) -> float:
        """The score of all questions."""
        return float(self.function(self.parts.sum(axis=0)))

    @property
    def is_mean(self) -> bool:
        """Whether it is the mean over its questions of what they add to the first sum."""
        return self.function is _percent

    def of(self, ids: Sequence[str]) -> np.ndarray:
        """The parts of the questions `ids`, in their order; zeros for questions that the score leaves out."""
        rows = {id_: number for number, id_ in enumerate(self.ids)}
        padded = np.vstack([self.parts, np.zeros(self.parts.shape[1])])
        return padded[[rows.get(id_, -1) for id_ in ids]]


def mean_headline(ids: Sequence[str], values: np.ndarray) -> Headline:
    """The mean of `values` [questions], from 0 to 1, in percent."""
    parts = np.stack([np.asarray(values, dtype=float), np.ones(len(values))], axis=1)
    return Headline(tuple(ids), parts, _percent)


def grouped_headline(ids: Sequence[str], values: np.ndarray, groups: Sequence[str], scale: float | None) -> Headline:
    """A sum over groups of each group's mean, times `scale`; None for 100 / groups, the mean of the groups in percent.

    Args:
        ids: the questions.
        values: from 0 to 1 [questions].
        groups: the group of each question.
        scale: points of one group.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    parts = np.zeros((len(ids), 2 * len(names)))
    rows = np.arange(len(ids))
    parts[rows, member], parts[rows, len(names) + member] = values, 1.0
    factor = 100 / len(names) if scale is None else scale
    return Headline(tuple(ids), parts, lambda sums: factor * ratios(sums, len(names)).sum(axis=-1))


def ratios(sums: np.ndarray, count: int) -> np.ndarray:
    """The first `count` of `sums` [..., 2 * count] divided by the others; NaN where one of these is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., :count] / np.where(sums[..., count:] == 0, np.nan, sums[..., count:])


def _percent(sums: np.ndarray) -> np.ndarray:
    return 100 * ratios(sums, 1)[..., 0]


def split_headline(values: Mapping[str, bool | float], splits: Mapping[str, str], preferred: str) -> Headline:
    """The mean of the questions of one split, in percent: of `preferred`, or else of the first one.

    Args:
        values: from 0 to 1, by question.
        splits: the split of each question, at least.
        preferred: name of the split that a score is of, where a file has several.
    """
    present = [splits[id_] for id_ in values]
    chosen = preferred if preferred in present else present[0]
    ids = [id_ for id_, split in zip(values, present, strict=True) if split == chosen]
    return mean_headline(ids, np.array([values[id_] for id_ in ids]))


def f1_headline(
    ids: Sequence[str], claimed: np.ndarray, gold: np.ndarray, splits: Sequence[Sequence[str]], pooled: bool
) -> Headline:
    """The F1 of yes/no answers in percent, 2 TP / (claimed + gold): the mean over the splits, or of all together.

    Args:
        ids: the questions.
        claimed: whether the answer is yes [questions].
        gold: whether the right answer is yes [questions].
        splits: those of each question; in the pooled score it counts once in each.
        pooled: whether the splits are taken together.
    """
    names = ["all"] if pooled else sorted({name for own in splits for name in own})
    parts = np.zeros((len(ids), 2 * len(names)))
    for number, name in enumerate(names):
        times = np.array([len(own) if pooled else name in own for own in splits], dtype=float)
        parts[:, number] = 200 * times * (claimed & gold)
        parts[:, len(names) + number] = times * (claimed.astype(float) + gold)

    def mean_f1(sums: np.ndarray) -> np.ndarray:
        return np.nan_to_num(ratios(sums, len(names))).mean(axis=-1)  # F1 without any yes is 0, as in the scorers

    return Headline(tuple(ids), parts, mean_f1)
