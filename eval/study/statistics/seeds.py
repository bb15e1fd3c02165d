"""Results of models that differ only in the seed of their training.

Decoding is greedy, so an evaluation has no seed of its own: the spread is that of training. Models of one recipe are
called NAME-seed-N, see `eval.answering.models`.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from eval.scoring.headline import Function
from eval.scoring.intervals import CONFIDENCE, Interval, bootstrap
from eval.showing.results import Result
from eval.study.statistics.scored import Scored, same_headlines

_SEEDED = re.compile(r"(?P<base>.+)-seed-(?P<seed>\d+)(?P<rest>(?:[-@].*)?)")


@dataclass(frozen=True)
class Spread:
    """The score of several seeds.

    Attributes:
        seeds: of the models.
        scores: of each.
        mean: over the seeds, with an interval for other seeds and other questions together.
        deviation: standard deviation over the seeds, with n - 1.
    """

    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    mean: Interval
    deviation: float


def seed_of(name: str) -> tuple[str, int] | None:
    """The name that all seeds of a model share, and its seed; None if its name has none."""
    found = _SEEDED.fullmatch(name)
    return (found["base"] + found["rest"], int(found["seed"])) if found else None


def grouped(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """The results of two seeds or more, by benchmark and the seeds' common name, in the order of the seeds.

    Groups that do not answer the same questions of the same file are left out.
    """
    groups: dict[tuple[str, str], list[tuple[int, Result]]] = defaultdict(list)
    for result in results:
        if (found := seed_of(result.model)) is not None and result.facts["status"] == "scored" and result.values:
            groups[result.benchmark, found[0]].append((found[1], result))
    ordered = {key: sorted(own, key=lambda entry: entry[0]) for key, own in sorted(groups.items())}
    found_groups = {key: [result for _, result in own] for key, own in ordered.items() if len(own) > 1}
    return {key: own for key, own in found_groups.items() if len({_asked(result) for result in own}) == 1}


def _asked(result: Result) -> tuple[str, str, frozenset[str]]:
    return result.facts["data"]["sha256"], result.facts["rule"], frozenset(result.values)


def spread(group: Sequence[Scored]) -> Spread:
    """Mean, standard deviation and interval of the seeds of one model on one benchmark, two or more."""
    scores = np.array([headline.value for headline in same_headlines(group)])
    mean, _ = estimate(float(scores.mean()), mean_draws(group), [scores], units_of(group[0]))
    highest = group[0].result.facts.get("full_score") or 100.0
    mean = Interval(mean.value, max(0.0, mean.low), min(highest, mean.high))  # Student's knows no bounds
    found = [seed_of(own.result.model) for own in group]
    seeds = tuple(name[1] for name in found if name)
    return Spread(seeds, tuple(scores.tolist()), mean, float(scores.std(ddof=1)))


def units_of(scored: Scored) -> int:
    """The number of images that are resampled, or of questions where no image is shared."""
    return len(scored.ids) if scored.clusters is None else int(scored.clusters.max()) + 1


def mean_draws(group: Sequence[Scored], other: Sequence[Scored] = ()) -> np.ndarray:
    """The mean score of the seeds of `group`, minus that of `other`'s, on resamples of the images all answer."""
    first = group[0]
    headlines = same_headlines([*group, *other])
    parts = [headline.of(first.ids) for headline in headlines]
    width = parts[0].shape[1]
    function: Function = headlines[0].function

    def mean(sums: np.ndarray) -> np.ndarray:
        scores = [function(sums[..., n * width : (n + 1) * width]) for n in range(len(parts))]
        value = np.mean(scores[: len(group)], axis=0)
        return value - np.mean(scores[len(group) :], axis=0) if other else value

    return bootstrap(np.hstack(parts), mean, first.clusters)


def estimate(value: float, draws: np.ndarray, seeds: Sequence[np.ndarray], units: int) -> tuple[Interval, float]:
    """An interval over seeds and questions together, and the two-sided p of the value 0.

    The variance is that of the resampled questions plus s^2 / n for each model with n > 1 seeds, whose scores have the
    variance s^2; the interval is Student's, with Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946). What
    changes with seed and question at once is in both terms, so the interval is rather too wide than too narrow.

    Args:
        value: the mean, or the difference of two means.
        draws: it on resamples of the images, the seeds as they are.
        seeds: the scores of each model's seeds.
        units: number of images or questions resampled.
    """
    terms = [(float(draws.var(ddof=1)), max(1, units - 1))]
    terms += [(float(own.var(ddof=1)) / len(own), len(own) - 1) for own in seeds if len(own) > 1]
    variance = sum(term for term, _ in terms)
    if variance == 0:  # nothing varies, of which so many draws prove no smaller p
        return Interval(value, value, value), 1.0 if value == 0 else 1 / (len(draws) + 1)
    freedom = variance**2 / sum(term**2 / own for term, own in terms)
    error = variance**0.5
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return Interval(value, value - half, value + half), float(2 * stats.t.sf(abs(value) / error, freedom))
