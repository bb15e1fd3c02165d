"""Scores as pictures: bars of all benchmarks, and radars."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_skip_base.console import figure

Scores = Mapping[str, Sequence[float | None]]
FEWEST_AXES = 3
INCH_PER_GROUP = 1.2


def bars(path: Path, models: Sequence[str], scores: Scores) -> None:
    """Draw a group of bars for each benchmark, one bar a model.

    Args:
        path: the PNG file.
        models: the models' names.
        scores: benchmark -> score of each model from 0 to 100, None where there is none.
    """
    width = 0.8 / len(models)
    with figure(path, (max(5.0, 2 + INCH_PER_GROUP * len(scores)), 4)) as axes:
        for number, model in enumerate(models):
            centres = [group + (number - (len(models) - 1) / 2) * width for group in range(len(scores))]
            heights = [values[number] or 0.0 for values in scores.values()]
            drawn = axes.bar(centres, heights, width, label=model)
            labels = ["-" if values[number] is None else f"{values[number]:.1f}" for values in scores.values()]
            axes.bar_label(drawn, labels, fontsize=7)
        axes.set_xticks(range(len(scores)), list(scores))
        axes.set_ylim(0, 105)
        axes.set_ylabel("score, 0 to 100 (MME: right answers)" if "mme" in scores else "score, 0 to 100")
        axes.figure.legend(loc="outside upper center", ncols=3, frameon=False)


def radar(path: Path, models: Sequence[str], scores: Scores) -> None:
    """Draw a radar with an axis for each part, one line a model.

    Args:
        path: the PNG file.
        models: the models' names.
        scores: part -> score of each model from 0 to 100; at least three parts, none of them None.
    """
    if len(scores) < FEWEST_AXES:
        raise ValueError(f"a radar needs {FEWEST_AXES} axes or more, got {len(scores)}.")
    angles = [2 * math.pi * number / len(scores) for number in range(len(scores))]
    with figure(path, (7, 6), subplot_kw={"projection": "polar"}) as axes:
        for number, model in enumerate(models):
            values = [values[number] or 0.0 for values in scores.values()]
            axes.plot([*angles, angles[0]], [*values, values[0]], label=model, linewidth=1.5)
            axes.fill(angles, values, alpha=0.1)
        axes.set_xticks(angles, list(scores), fontsize=8)
        axes.tick_params(axis="x", pad=22)
        axes.set_ylim(0, 100)
        axes.figure.legend(loc="outside upper center", ncols=3, frameon=False)
