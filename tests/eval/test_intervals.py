"""Intervals and tests with known truths."""

import itertools

import numpy as np
import pytest
from scipy import stats

from eval.scoring.headline import f1_headline, grouped_headline, mean_headline
from eval.scoring.intervals import (
    bootstrap,
    difference_of,
    headline_interval,
    interval,
    sign_flip_test,
    swap_draws,
    tail,
)

IMAGES, QUESTIONS = 80, 10


def answers(rng: np.random.Generator, share: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong, where images differ in how hard they are, with a mean of `share`; and the questions' images."""
    hard = rng.beta(2 * share, 2 * (1 - share), IMAGES)  # correlation within images: 1 / (1 + 2) = 0.33
    return (rng.random((IMAGES, QUESTIONS)) < hard[:, None]).ravel(), np.repeat(np.arange(IMAGES), QUESTIONS)


def covers(draws: np.ndarray, value: float, truth: float) -> bool:
    found = interval(value, draws)
    return found.low <= truth <= found.high


def test_intervals_by_image_hold_the_truth_95_times_in_100_and_by_question_far_less() -> None:
    rng = np.random.default_rng(0)
    by_image, by_question = [], []
    for _ in range(400):
        right, images = answers(rng)
        headline = mean_headline(list(map(str, range(len(right)))), right)
        own, alone = (bootstrap(headline.parts, headline.function, c, 1000) for c in (images, None))
        by_image.append(covers(own, headline.value, 60.0))
        by_question.append(covers(alone, headline.value, 60.0))
    assert 0.92 <= np.mean(by_image) <= 0.98
    assert np.mean(by_question) < 0.75


def test_difference_of_two_models_holds_the_truth() -> None:
    rng = np.random.default_rng(1)
    held = []
    for _ in range(250):
        (a, images), b = answers(rng), answers(rng, 0.7)[0]
        first, second = (mean_headline(list(map(str, range(len(a)))), own) for own in (a, b))
        both = np.hstack([first.parts, second.parts])
        draws = bootstrap(both, difference_of(first.function), images, 500)
        held.append(covers(draws, second.value - first.value, 10.0))
    assert 0.92 <= np.mean(held) <= 0.98


def test_kinds_that_are_drawn_together_give_the_spread_of_single_draws() -> None:
    """The mean of few values (drawn by kind) and of many (drawn one by one) has the standard error of theory."""
    rng = np.random.default_rng(2)
    for values in (rng.random(500) < 0.3, rng.random(500)):
        headline = mean_headline(list(map(str, range(500))), values)
        draws = bootstrap(headline.parts, headline.function)
        assert draws.std() == pytest.approx(100 * values.std() / np.sqrt(500), rel=0.03)
        assert np.array_equal(draws, bootstrap(headline.parts, headline.function))


def test_f1_of_resamples_is_that_of_the_repeated_questions() -> None:
    rng = np.random.default_rng(3)
    claimed, gold = rng.random(40) < 0.5, rng.random(40) < 0.5
    splits = [["a"] if n % 2 else ["a", "b"] for n in range(40)]
    times = rng.integers(0, 3, 40)

    def f1(own: list[int]) -> float:
        both = sum(times[n] * (claimed[n] and gold[n]) for n in own)
        return 200 * both / sum(times[n] * (int(claimed[n]) + int(gold[n])) for n in own)

    every, even = list(range(40)), list(range(0, 40, 2))
    ids = list(map(str, range(40)))
    mean, pooled = (f1_headline(ids, claimed, gold, splits, pooled) for pooled in (False, True))
    assert mean.function(times @ mean.parts) == pytest.approx((f1(every) + f1(even)) / 2)
    assert pooled.function(times @ pooled.parts) == pytest.approx(f1([*every, *even]))
    nothing = f1_headline(ids, claimed & False, gold & False, splits, False)
    assert nothing.value == 0.0 and headline_interval(nothing).high == 0.0


def test_groups_count_the_same_whatever_their_size() -> None:
    values = np.array([1, 1, 1, 1, 0, 1])
    headline = grouped_headline(list("abcdef"), values, list("xxxxyy"), None)
    assert headline.value == 75.0
    assert grouped_headline(list("abcdef"), values, list("xxxxyy"), 100.0).value == 150.0
    assert len(bootstrap(headline.parts, headline.function)) < 10_000  # a resample without one group has no score


def test_sign_flips_are_exact() -> None:
    rng = np.random.default_rng(4)
    difference, images = rng.integers(-1, 2, 36), rng.integers(0, 11, 36)
    sums = np.bincount(images, difference, minlength=11)
    every = np.array(list(itertools.product((-1, 1), repeat=11))) @ sums
    p, exact = sign_flip_test(difference, images)
    assert exact and p == pytest.approx((np.abs(every) >= abs(sums.sum())).mean())
    p, exact = sign_flip_test(np.array([1] * 10 + [-1] * 2 + [0] * 5))
    assert p == pytest.approx(stats.binomtest(2, 12).pvalue)  # McNemar's


def test_equal_models_are_called_different_5_times_in_100() -> None:
    rng = np.random.default_rng(5)
    by_image, by_question = [], []
    for _ in range(400):
        (a, images), b = answers(rng), answers(rng)[0]
        by_image.append(sign_flip_test(b.astype(int) - a, images)[0] < 0.05)
        by_question.append(sign_flip_test(b.astype(int) - a)[0] < 0.05)
    assert np.mean(by_image) < 0.08 and np.mean(by_question) > 0.2


def test_exchange_of_models_gives_the_p_of_sign_flips() -> None:
    rng = np.random.default_rng(6)
    (a, images), b = answers(rng), answers(rng, 0.7)[0]
    first, second = (mean_headline(list(map(str, range(len(a)))), own) for own in (a, b))
    chance = swap_draws(first.parts, second.parts, first.function, images)
    exact, _ = sign_flip_test(b.astype(int) - a, images)
    assert tail(second.value - first.value, chance) == pytest.approx(exact, abs=0.01)
    assert tail(0.0, swap_draws(first.parts, first.parts, first.function, images)) == 1.0
