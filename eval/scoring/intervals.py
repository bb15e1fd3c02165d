"""How sure a score is: the one place where questions are resampled.

A score is a function of sums over questions (`eval.scoring.headline`), so one resample is one vector of sums.
Questions about one image are not independent; whole images are drawn, with all their questions (cluster bootstrap:
Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8; Field and Welsh, J. R. Statist. Soc. B
69, 2007).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from eval.scoring.headline import Function, Headline

CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 0
DRAWN_AT_ONCE = 1_000_000
"""Most values drawn at once: any benchmark fits into memory, and a piece of the work into a core's cache."""
MANY_KINDS = 20
"""A binomial number takes about as long as this many whole ones, which decides how a resample is drawn."""
FEW_CLUSTERS = 30
"""Below this number of images intervals are called too narrow: of a mean by 6% at 30 images, and by 18% at 10."""
ROUNDING = 1e-9
"""Sums that differ by less are equal: a draw that equals the observed value counts as at least as large."""


@dataclass(frozen=True)
class Interval:
    """A value and its confidence interval from `low` to `high`, all in the value's unit."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def numbered(keys: Sequence[str]) -> np.ndarray:
    """The number, from 0, of each question's cluster [questions], by the image that it is about."""
    return np.unique(np.asarray(keys), return_inverse=True)[1]


def clustered(parts: np.ndarray, clusters: np.ndarray | None) -> np.ndarray:
    """The sums of `parts` [questions, parts] over each cluster [clusters, parts]; None: each question is one."""
    if clusters is None:
        return parts
    sums = np.zeros((int(clusters.max()) + 1, parts.shape[1]))
    np.add.at(sums, clusters, parts)
    return sums


def bootstrap(
    parts: np.ndarray, function: Function, clusters: np.ndarray | None = None, resamples: int = RESAMPLES,
    seed: int = SEED,
) -> np.ndarray:  # fmt: skip
    """A function's values on seeded resamples of the clusters, drawn with replacement, as many as there are.

    Clusters with equal sums are drawn as one kind: how often each kind comes is multinomial, which is the same
    distribution, with far fewer random numbers where there are few kinds.

    Args:
        parts: what each question adds to the sums [questions, parts].
        function: sums [..., parts] to values [...].
        clusters: the number of each question's cluster; None resamples questions.
        resamples: how many.
        seed: of the draws.

    Returns:
        Values [resamples], without those that are not defined.
    """
    kinds, counts = np.unique(clustered(parts, clusters), axis=0, return_counts=True)
    total, rng = int(counts.sum()), np.random.default_rng(seed)
    sums = [_drawn(rng, counts, size) @ kinds for size in _batches(resamples, total)]
    values = function(np.concatenate(sums))
    return values[~np.isnan(values)]


def _drawn(rng: np.random.Generator, counts: np.ndarray, size: int) -> np.ndarray:
    """How often each kind comes in `size` resamples [size, kinds], as floats for a matrix product."""
    total = int(counts.sum())
    if len(counts) < total / MANY_KINDS:
        return rng.multinomial(total, counts / total, size).astype(float)
    drawn = rng.integers(0, total, (size, total), dtype=np.int32)
    kind = drawn if len(counts) == total else np.repeat(np.arange(len(counts)), counts)[drawn]
    flat = kind + len(counts) * np.arange(size)[:, None]
    return np.bincount(flat.ravel(), minlength=size * len(counts)).reshape(size, -1).astype(float)


def interval(value: float, draws: np.ndarray) -> Interval:
    """The percentile interval of bootstrap values; the value alone where nothing could be drawn."""
    if not len(draws):
        return Interval(value, value, value)
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high))


def headline_interval(headline: Headline, clusters: np.ndarray | None = None) -> Interval:
    """The score and its interval; `clusters` are the numbers of the clusters of `headline.ids`."""
    return interval(headline.value, bootstrap(headline.parts, headline.function, clusters))


def difference_of(function: Function) -> Function:
    """From two models' sums side by side [..., 2 * parts] to the second one's score minus the first one's."""

    def difference(sums: np.ndarray) -> np.ndarray:
        half = sums.shape[-1] // 2
        return function(sums[..., half:]) - function(sums[..., :half])

    return difference


def difference_draws(a: np.ndarray, b: np.ndarray, function: Function, clusters: np.ndarray | None) -> np.ndarray:
    """The difference b - a of two scores on resamples of their common questions [resamples].

    `a` and `b` are the parts [questions, parts] of the same questions in the same order.
    """
    return bootstrap(np.hstack([a, b]), difference_of(function), clusters)


def sign_flip_test(difference: np.ndarray, clusters: np.ndarray | None = None) -> tuple[float, bool]:
    """Whether a sum of paired differences is larger than chance makes it, if the two models were equally good.

    Then the two answers to the questions of one image could as well be exchanged, so its difference could have either
    sign. With whole differences the distribution is exact: a sum of independent binomial ones. With one question an
    image that is McNemar's exact test (Psychometrika 12, 1947).

    Args:
        difference: b - a, question by question [questions].
        clusters: the number of each question's cluster.

    Returns:
        The two-sided probability of a sum this far from 0, and whether it is exact (else from seeded draws).
    """
    difference = difference.astype(float)
    sums = clustered(difference[:, None], clusters)[:, 0]
    sums, whole = sums[np.abs(sums) > ROUNDING], np.array_equal(difference, np.round(difference))
    if not len(sums):
        return 1.0, whole
    if whole:
        return _exact(np.abs(sums).astype(int), int(abs(sums.sum()))), True
    return tail(float(sums.sum()), _flipped(sums)), False


def swap_draws(a: np.ndarray, b: np.ndarray, function: Function, clusters: np.ndarray | None) -> np.ndarray:
    """The difference of two scores with the models exchanged on a random half of the images [resamples].

    Args:
        a: parts of the first model [questions, parts].
        b: parts of the second one, of the same questions.
        function: sums [..., parts] to scores.
        clusters: the number of each question's cluster.
    """
    own, other = clustered(a, clusters), clustered(b, clusters)
    changed = (own != other).any(axis=1)
    half, total = (other - own)[changed] / 2, (own + other).sum(axis=0) / 2
    rng, draws = np.random.default_rng(SEED), []
    for size in _batches(RESAMPLES, max(1, len(half))):
        moved = (2.0 * rng.integers(0, 2, (size, len(half)), dtype=np.int8) - 1) @ half
        draws.append(function(total + moved) - function(total - moved))
    values = np.concatenate(draws)
    return values[~np.isnan(values)]


def tail(observed: float, draws: np.ndarray) -> float:
    """The two-sided p of an observed value among draws without a difference; the observed one counts as a draw."""
    return float((1 + (np.abs(draws) >= abs(observed) - ROUNDING).sum()) / (1 + len(draws)))


def _exact(sizes: np.ndarray, observed: int) -> float:
    """P(|sum of +-size| >= observed), all signs equally likely."""
    chances = np.ones(1)
    for size, count in zip(*np.unique(sizes, return_counts=True), strict=True):
        steps = np.zeros(2 * int(size) * int(count) + 1)
        steps[:: 2 * int(size)] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, steps)
    sums = np.arange(len(chances)) - sizes.sum()
    return float(min(1.0, chances[np.abs(sums) >= observed].sum()))


def _flipped(sums: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(SEED)
    batches = _batches(RESAMPLES, len(sums))
    signs = (2.0 * rng.integers(0, 2, (size, len(sums)), dtype=np.int8) - 1 for size in batches)
    return np.concatenate([own @ sums for own in signs])


def _batches(total: int, width: int) -> Iterator[int]:
    """Sizes that add up to `total`, each of at most `DRAWN_AT_ONCE` values."""
    most = max(1, DRAWN_AT_ONCE // width)
    yield from (min(most, total - start) for start in range(0, total, most))
