"""Two results on the same questions: how far apart they are, how sure that is, and what chance could have done."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from eval.scoring.headline import Headline, mean_headline
from eval.scoring.intervals import (
    CONFIDENCE,
    RESAMPLES,
    Interval,
    bootstrap,
    difference_draws,
    headline_interval,
    interval,
    sign_flip_test,
    swap_draws,
    tail,
)
from eval.showing.results import Result
from eval.study.statistics.scored import Scored, find_keys, load_scored, refuse_unscored, same_headlines
from llava_skip_base.errors import UserError, first_few


@dataclass(frozen=True)
class Comparison:
    """Two models on the same questions, by the mean over questions in percent.

    Attributes:
        difference: b - a, question by question.
        only_a: number of questions that the first model answers better.
        only_b: number of questions that the second one answers better.
        test: name of the paired test.
        p: probability of a difference this large if the models were equally good.
        within_noise: whether p is above 1 - the confidence level.
        images: number of images that were resampled; None if questions were.
    """

    questions: int
    a: Interval
    b: Interval
    difference: Interval
    only_a: int
    only_b: int
    test: str
    p: float
    within_noise: bool
    images: int | None = None


@dataclass(frozen=True)
class ScoreComparison:
    """Two models by the score as the benchmark has it (POPE's F1, MME's sum), in its points; as `Comparison`."""

    a: Interval
    b: Interval
    difference: Interval
    test: str
    p: float
    within_noise: bool


def compare(a: np.ndarray, b: np.ndarray, clusters: np.ndarray | None = None) -> Comparison:
    """Compare the values of two models on the same questions.

    Intervals are percentiles of 10,000 seeded bootstrap resamples of the images. The test is exact if every value is
    right or wrong (McNemar's where each question has its own image), else a paired permutation test on the mean.

    Args:
        a: right or wrong (bool), or grades from 0 to 1 (float), of the first model [questions].
        b: the same of the second one.
        clusters: the number of each question's image; None if each has its own, or if that is not known.
    """
    ids = list(map(str, range(len(a))))
    first, second = mean_headline(ids, a), mean_headline(ids, b)
    difference = b.astype(float) - a.astype(float)
    p, exact = sign_flip_test(difference, clusters)
    draws = difference_draws(first.parts, second.parts, first.function, clusters)
    return Comparison(
        len(a),
        headline_interval(first, clusters),
        headline_interval(second, clusters),
        interval(100 * float(difference.mean()), draws),
        int((a > b).sum()),
        int((b > a).sum()),
        _test_name(exact, clusters),
        p,
        p > 1 - CONFIDENCE,
        None if clusters is None else int(clusters.max()) + 1,
    )


def _test_name(exact: bool, clusters: np.ndarray | None) -> str:
    by_image = "" if clusters is None else " by image"
    return f"McNemar{by_image}, exact" if exact else f"paired permutation{by_image}, {RESAMPLES} draws"


@dataclass(frozen=True)
class Pair:
    """Two results that can be compared.

    Attributes:
        a: the first.
        b: the second, on the same questions.
        notes: what a reader must know.
    """

    a: Scored
    b: Scored
    notes: tuple[str, ...] = ()

    @property
    def ids(self) -> list[str]:
        """Their questions."""
        return self.a.ids

    @property
    def clusters(self) -> np.ndarray | None:
        """The number of each question's image; None if no two are known to share one."""
        return self.a.clusters

    def questions(self) -> Comparison:
        """Compare the means over questions."""
        return compare(self.a.values(self.ids), self.b.values(self.ids), self.clusters)

    def score(self) -> ScoreComparison:
        """Compare the scores as the benchmark has them."""
        first, second = self._headlines
        observed = second.value - first.value
        p, exact = self._p(observed)
        return ScoreComparison(
            interval(first.value, bootstrap(first.of(self.ids), first.function, self.clusters)),
            interval(second.value, bootstrap(second.of(self.ids), second.function, self.clusters)),
            interval(observed, self.draws),
            _test_name(exact, self.clusters),
            p,
            p > 1 - CONFIDENCE,
        )

    @cached_property
    def draws(self) -> np.ndarray:
        """The difference of the scores, b - a, on resamples of the images."""
        a, b, headline = self._parts
        return difference_draws(a, b, headline.function, self.clusters)

    @cached_property
    def chance(self) -> np.ndarray:
        """The difference of the scores with the two models exchanged on a random half of the images."""
        a, b, headline = self._parts
        return swap_draws(a, b, headline.function, self.clusters)

    def _p(self, observed: float) -> tuple[float, bool]:
        a, b, headline = self._parts
        if not headline.is_mean:
            return tail(observed, self.chance), False
        return sign_flip_test(b[:, 0] - a[:, 0], self.clusters)

    @cached_property
    def _headlines(self) -> tuple[Headline, Headline]:
        first, second = same_headlines((self.a, self.b))
        return first, second

    @property
    def _parts(self) -> tuple[np.ndarray, np.ndarray, Headline]:
        first, second = self._headlines
        return first.of(self.ids), second.of(self.ids), first


_COMPARED = ("benchmark", "data", "protocol", "rule", "max_new_tokens", "judge")


def load_pair(a: Result, b: Result) -> Pair:
    """Pair two results, after checking that they can be compared.

    Raises:
        UserError: one is not scored, or they differ in more than the model.
    """
    for result in (a, b):
        refuse_unscored(result)
    refuse_different(a, b)
    keys = find_keys(a) or find_keys(b)
    first, second = (load_scored(result, keys or {}) for result in (a, b))
    return Pair(first, second, tuple(dict.fromkeys((*first.notes, *second.notes))))


def refuse_different(a: Result, b: Result) -> None:
    """Raise UserError if two results are of different data, questions, protocol, rule or judge."""
    different = [f"{name}: {x} and {y}" for name, x, y in zip(_COMPARED, _key(a), _key(b), strict=True) if x != y]
    if different:
        raise UserError(
            f"{a.folder} and {b.folder} differ in more than the model ({'; '.join(different)}), so their scores cannot "
            "be compared; evaluate both alike."
        )
    if unpaired := sorted(a.values.keys() ^ b.values.keys()):
        raise UserError(
            f"{first_few(unpaired)} questions are in one of the results only (a --limit?); evaluate both alike."
        )


def _key(result: Result) -> tuple[object, ...]:
    facts = result.facts
    limits = (facts.get("generation") or {}).get("max_new_tokens")
    return (facts["benchmark"], facts["data"]["sha256"], facts["protocol"], facts["rule"], limits, facts.get("judge"))
