"""Two models on several benchmarks at once, each with one seed or several: Holm's correction, and the average."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from eval.scoring.intervals import RESAMPLES, SEED, Interval, interval, tail
from eval.showing.results import Result, find_results
from eval.study.statistics.loyalty import loyalty
from eval.study.statistics.pairs import Pair, load_pair
from eval.study.statistics.scored import Scored, same_headlines
from eval.study.statistics.seeds import estimate, mean_draws, seed_of, spread, units_of
from llava_skip_base.errors import UserError

T_TEST = "t-test over seeds and questions"


@dataclass(frozen=True)
class Row:
    """Two models on one benchmark, by its score; `adjusted` is p by Holm's procedure over all benchmarks."""

    benchmark: str
    questions: int
    images: int | None
    a: Interval
    b: Interval
    difference: Interval
    loyalty: Interval | None
    test: str
    p: float
    adjusted: float


@dataclass(frozen=True)
class Average:
    """The mean over the benchmarks of the scores, each in percent of its highest."""

    a: float
    b: float
    difference: Interval
    test: str
    p: float


@dataclass(frozen=True)
class Contest:
    """Two models on one benchmark.

    Attributes:
        a: the first, one result for each seed.
        b: the second.
        pair: the two, if both have one seed.
        notes: what a reader must know.
    """

    a: tuple[Scored, ...]
    b: tuple[Scored, ...]
    pair: Pair
    notes: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        """Whether both models have one seed."""
        return len(self.a) == len(self.b) == 1

    @property
    def scale(self) -> float:
        """What makes the score one of 0 to 100."""
        return 100 / (self.a[0].result.facts.get("full_score") or 100.0)

    @cached_property
    def draws(self) -> np.ndarray:
        """The difference b - a on resamples of the images."""
        return self.pair.draws if self.is_plain else mean_draws(self.b, self.a)

    def row(self) -> Row:
        """The comparison, whose p is not adjusted yet."""
        first, clusters = self.a[0], self.a[0].clusters
        images = None if clusters is None else int(clusters.max()) + 1
        if self.is_plain:
            found = self.pair.score()
            same = loyalty(self.b[0].result, first.result, first.keys) if has_answers(self.pair) else None
            return Row(
                *(first.result.benchmark, len(first.ids), images, found.a, found.b, found.difference),
                *(same, found.test, found.p, found.p),
            )
        a, b = _scores(self.a), _scores(self.b)
        difference, p = estimate(float(b.mean() - a.mean()), self.draws, (a, b), units_of(first))
        one, other = (spread(own).mean if len(own) > 1 else own[0].interval() for own in (self.a, self.b))
        return Row(first.result.benchmark, len(first.ids), images, one, other, difference, None, T_TEST, p, p)


def holm(values: Sequence[float]) -> list[float]:
    """The p-values adjusted by Holm's step-down procedure (Scand. J. Statist. 6, 1979), in the order given.

    Those below a level are the ones it rejects; the chance of any false one among all is then below the level, whatever
    the dependence of the tests.
    """
    order = sorted(range(len(values)), key=lambda number: values[number])
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, number in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[number]))
        adjusted[number] = highest
    return adjusted


def compare_many(contests: Sequence[Contest]) -> tuple[list[Row], Average]:
    """Compare on each benchmark, with p adjusted, and on the average of all."""
    rows = [contest.row() for contest in contests]
    adjusted = holm([row.p for row in rows])
    rows = [replace(row, adjusted=p) for row, p in zip(rows, adjusted, strict=True)]
    return rows, average(contests)


def average(contests: Sequence[Contest]) -> Average:
    """The mean of the benchmarks' scores, which are resampled each by itself; seeds are those that all of them have."""
    sides = [_common([getattr(contest, name) for contest in contests]) for name in ("a", "b")]
    means = [
        np.mean([contest.scale * own for contest, own in zip(contests, side, strict=True)], axis=0) for side in sides
    ]
    value = float(means[1].mean() - means[0].mean())
    draws = _averaged([contest.scale * contest.draws for contest in contests])
    scores = float(means[0].mean()), float(means[1].mean())
    if all(contest.is_plain for contest in contests):
        chance = _averaged([contest.scale * contest.pair.chance for contest in contests])
        return Average(*scores, interval(value, draws), f"paired permutation, {RESAMPLES} draws", tail(value, chance))
    units = min(units_of(contest.a[0]) for contest in contests)
    difference, p = estimate(value, draws, means, units)
    return Average(*scores, difference, T_TEST, p)


def contests(a: Sequence[Result], b: Sequence[Result]) -> list[Contest]:
    """Pair the results of two models, by benchmark.

    Raises:
        UserError: they share no scored benchmark, or differ in more than the model.
    """
    mine, other = _by_benchmark(a), _by_benchmark(b)
    found = []
    for benchmark in (name for name in mine if name in other):
        first = mine[benchmark][0]
        pairs = [load_pair(first, result) for result in (*mine[benchmark][1:], *other[benchmark])]
        count, notes = len(mine[benchmark]) - 1, dict.fromkeys(note for pair in pairs for note in pair.notes)
        own = (pairs[0].a, *(pair.b for pair in pairs[:count]))
        found.append(Contest(own, tuple(pair.b for pair in pairs[count:]), pairs[count], tuple(notes)))
    if not found:
        names = [" and ".join(sorted({result.model for result in side})) or "nothing" for side in (a, b)]
        raise UserError(f"{names[0]} and {names[1]} have no scored benchmark in common; evaluate both on the same.")
    return found


def results_of(name: str, places: Sequence[Path]) -> list[Result]:
    """The results of a model, or of all seeds of NAME-seed-N, in folders and below.

    Raises:
        UserError: there are none.
    """
    found = find_results(places)
    own = [result for result in found if result.model == name]
    own = own or [result for result in found if (seed_of(result.model) or ("",))[0] == name]
    if not own:
        known = sorted({result.model for result in found})
        raise UserError(f"no result of {name!r} in {', '.join(map(str, places))}; there are {', '.join(known)}.")
    return own


def _by_benchmark(results: Sequence[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: (seed_of(result.model) or ("", 0))[1]):
        if result.facts["status"] == "scored" and result.values:
            groups.setdefault(result.benchmark, []).append(result)
    return dict(sorted(groups.items()))


def _scores(group: Sequence[Scored]) -> np.ndarray:
    return np.array([headline.value for headline in same_headlines(group)])


def _common(groups: Sequence[Sequence[Scored]]) -> list[np.ndarray]:
    """The scores of each benchmark, of the seeds that all benchmarks have."""
    named = [{seed_of(own.result.model) or own.result.model: own.headline.value for own in group} for group in groups]
    shared = set.intersection(*(set(own) for own in named))
    if not shared:
        raise UserError("no seed was evaluated on all of the benchmarks, so they have no average; evaluate the rest.")
    return [np.array([own[name] for name in sorted(shared, key=str)]) for own in named]


def _averaged(draws: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of draws of different benchmarks, in an order of its own each: they come from equal seeds."""
    shuffled = [np.random.default_rng([SEED, number]).permutation(own) for number, own in enumerate(draws)]
    return np.mean([own[: min(map(len, shuffled))] for own in shuffled], axis=0)


def has_answers(pair: Pair) -> bool:
    """Whether the answers of both models are there."""
    return all((own.result.folder / "answers.jsonl").is_file() for own in (pair.a, pair.b))
