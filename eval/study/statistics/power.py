"""What a comparison of two models can detect, before the models are run."""

from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from eval.scoring.intervals import CONFIDENCE, clustered
from eval.study.statistics.pairs import Pair
from eval.study.statistics.seeds import units_of

POWER = 0.8


@dataclass(frozen=True)
class Design:
    """A comparison of two models on the same questions.

    Attributes:
        questions: their number.
        size: questions of an image that a question shares its image with, itself included, on average over questions.
        discordance: share of questions that only one of the two models answers right.
        correlation: of the differences of two questions about one image (intra-cluster correlation).
    """

    questions: int
    size: float
    discordance: float
    correlation: float

    @property
    def design_effect(self) -> float:
        """By how much shared images increase the variance, 1 + (size - 1) correlation (Kish, Survey Sampling, 1965)."""
        return max(0.0, 1 + (self.size - 1) * self.correlation)

    @property
    def independent(self) -> float:
        """The number of questions, each with an image of its own, that would tell as much."""
        return self.questions / self.design_effect if self.design_effect else float(self.questions)


def mean_size(images: np.ndarray) -> float:
    """The mean over questions of the questions that have the same image; `images` numbers that of each question."""
    counts = np.bincount(images)
    return float((counts.astype(float) ** 2).sum() / counts.sum())


def independent_discordance(accuracy: float) -> float:
    """The discordance of two models of an accuracy from 0 to 1 whose errors have nothing to do with each other.

    Models of one family agree more often, which makes a difference easier to see.
    """
    return 2 * accuracy * (1 - accuracy)


def detectable(
    design: Design, benchmarks: int = 1, power: float = POWER, alpha: float = 1 - CONFIDENCE
) -> float | None:
    """The smallest true difference, in points of the mean over questions, that the paired test finds with `power`.

    With d the difference and D the discordance, each question's difference has the variance D without a difference and
    D - d^2 with one, so d = z(1 - a/2) sqrt(D / n) + z(power) sqrt((D - d^2) / n), where n counts independent questions
    (Connor, Biometrics 43, 1987, for McNemar's test). For several benchmarks a = alpha / benchmarks, the first step of
    Holm's procedure and so its strictest.

    Args:
        design: the comparison.
        benchmarks: number of benchmarks that are corrected for.
        power: probability of finding the difference.
        alpha: probability of finding one where there is none, on any benchmark.

    Returns:
        Points from 0 to 100; None if even the largest difference that the discordance allows is not found.
    """
    level, found = (float(stats.norm.ppf(p)) for p in (1 - alpha / (2 * benchmarks), power))
    n, discordance = design.independent, design.discordance

    def lacking(difference: float) -> float:
        spread = np.sqrt(max(0.0, discordance - difference**2) / n)
        return float(level * np.sqrt(discordance / n) + found * spread - difference)

    if discordance <= 0 or lacking(discordance) > 0:
        return None
    return 100 * float(optimize.brentq(lacking, 0.0, discordance))


def detectable_by_pair(pair: Pair, benchmarks: int = 1, power: float = POWER, alpha: float = 1 - CONFIDENCE) -> float:
    """The smallest true difference of the score, in its points, judged by the standard error of a measured pair.

    For two other models that agree as often as these. The score may be any (POPE's F1, MME's sum): the difference is
    (z(1 - a/2) + z(power)) times the standard error over resampled images.
    """
    error = float(pair.draws.std(ddof=1))
    return error * float(stats.norm.ppf(1 - alpha / (2 * benchmarks)) + stats.norm.ppf(power))


def measured(pair: Pair) -> Design:
    """Discordance and correlation of a measured pair.

    The correlation comes from the analysis of variance between and within images, for images of unequal size (Donner
    and Klar, Design and Analysis of Cluster Randomization Trials, 2000, section 1.3); it can be negative.
    """
    ids = pair.ids
    difference = pair.b.values(ids).astype(float) - pair.a.values(ids).astype(float)
    discordance = float((difference**2).mean())
    images = pair.clusters
    if images is None:
        return Design(len(ids), 1.0, discordance, 0.0)
    counts = np.bincount(images).astype(float)
    sums = clustered(difference[:, None], images)[:, 0]
    total, number = len(ids), units_of(pair.a)
    if number < 2:  # one image tells as much as one question
        return Design(total, mean_size(images), discordance, 1.0)
    between = (counts * (sums / counts - difference.mean()) ** 2).sum() / (number - 1)
    within = ((difference - (sums / counts)[images]) ** 2).sum() / (total - number)
    size = (total - (counts**2).sum() / total) / (number - 1)
    variance = between + (size - 1) * within
    correlation = float((between - within) / variance) if variance else 0.0
    return Design(total, mean_size(images), discordance, correlation)
