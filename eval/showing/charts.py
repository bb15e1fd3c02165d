"""Scores as charts: bars of all benchmarks, and radar charts."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_skip_base.console import chart_label, figure

Scores = Mapping[str, Sequence[float | None]]
FEWEST_AXES = 3
INCH_PER_GROUP = 1.2


def bars(path: Path, models: Sequence[str], scores: Scores) -> None:
    """Draw a group of bars for each benchmark, one bar a model.

    `scores` is benchmark -> score of each model from 0 to 100, None where there is none.
    """
    with figure(path, (max(5.0, 2 + INCH_PER_GROUP * len(scores)), 4)) as axes:
        draw_bars(axes, models, scores)
        axes.set_ylim(0, 105)
        axes.set_ylabel("score, 0 to 100 (MME: right answers)" if "mme" in scores else "score, 0 to 100")
        axes.figure.legend(loc="outside upper center", ncols=3, frameon=False)


def draw_bars(axes: Any, models: Sequence[str], scores: Scores) -> None:
    """The bars of `bars`, with the score above each, on existing axes."""
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        centres = [group + (number - (len(models) - 1) / 2) * width for group in range(len(scores))]
        heights = [values[number] or 0.0 for values in scores.values()]
        drawn = axes.bar(centres, heights, width, label=chart_label(model))
        labels = ["-" if values[number] is None else f"{values[number]:.1f}" for values in scores.values()]
        axes.bar_label(drawn, labels, fontsize=7)
    axes.set_xticks(range(len(scores)), list(map(chart_label, scores)))


def radar(path: Path, models: Sequence[str], scores: Scores) -> None:
    """Draw a radar chart with an axis for each part, one line a model.

    `scores` is part -> score of each model from 0 to 100; at least three parts, no score may be None.
    """
    if len(scores) < FEWEST_AXES:
        raise ValueError(f"a radar needs {FEWEST_AXES} axes or more, got {len(scores)}.")
    angles = [2 * math.pi * number / len(scores) for number in range(len(scores))]
    with figure(path, (7, 6), subplot_kw={"projection": "polar"}) as axes:
        for number, model in enumerate(models):
            values = [values[number] or 0.0 for values in scores.values()]
            axes.plot([*angles, angles[0]], [*values, values[0]], label=chart_label(model), linewidth=1.5)
            axes.fill(angles, values, alpha=0.1)
        axes.set_xticks(angles, list(map(chart_label, scores)), fontsize=8)
        axes.tick_params(axis="x", pad=22)
        axes.set_ylim(0, 100)
        axes.figure.legend(loc="outside upper center", ncols=3, frameon=False)
