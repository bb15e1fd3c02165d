"""Scores on the questions that need the image's detail: those that a down-sampled image gets wrong.

Many questions are answered as well from a smaller image, and say nothing about which visual tokens a method keeps.
VTC-Bench (arXiv 2510.07143) lets the dense model answer with a down-sampled image and splits the questions by it. Its
groups A and B hold only questions that the dense model gets right with the whole image.
"""

import numpy as np

from eval.showing.results import Result
from eval.study.statistics.pairs import Comparison, Pair, compare, refuse_different
from eval.study.statistics.scored import refuse_unscored

DIFFICULT, SIMPLE = "difficult", "simple"
"""Questions that the down-sampled image gets wrong, and right."""
GROUP_A, GROUP_B = "group_a", "group_b"
"""Those of both that the first model, the dense one, gets right: VTC-Bench's groups."""
RIGHT = 0.5
"""The grade from which an answer counts as right."""


def by_difficulty(pair: Pair, downsampled: Result) -> dict[str, Comparison | None]:
    """Compare two models on each group of questions; None for an empty group.

    Args:
        pair: the two results; the dense model's first, for VTC-Bench's groups.
        downsampled: the dense model's result with a smaller image, on the same questions.

    Raises:
        UserError: it is of other questions, or has no score.
    """
    refuse_unscored(downsampled)
    refuse_different(pair.a.result, downsampled)
    ids = pair.ids
    wrong = np.array([float(downsampled.values[id_]) < RIGHT for id_ in ids])
    a, b, clusters = pair.a.values(ids), pair.b.values(ids), pair.clusters
    found: dict[str, Comparison | None] = {}
    known = a.astype(float) >= RIGHT
    groups = {DIFFICULT: wrong, SIMPLE: ~wrong, GROUP_A: wrong & known, GROUP_B: ~wrong & known}
    for name, group in groups.items():
        own = None if clusters is None else np.unique(clusters[group], return_inverse=True)[1]
        found[name] = compare(a[group], b[group], own) if group.any() else None
    return found


def is_downsampled(result: Result) -> bool:
    """Whether a result says that its images were down-sampled."""
    return "downsample" in f"{result.model} {result.facts['model'].get('reduction')}"
