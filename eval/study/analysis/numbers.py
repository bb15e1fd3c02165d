"""Many values as a few numbers, which a result file holds and a chart draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
Numbers = dict[str, Any]


def summarise(values: Any) -> Numbers:
    """Count, mean and quantiles of all values, in float64.

    Values that are not finite (a state that is zero has no relative update) are counted and left out. Without any
    value the numbers are None.
    """
    found = np.asarray(values, dtype=np.float64).ravel()
    finite = found[np.isfinite(found)]
    numbers: Numbers = {"n": len(finite), "not_finite": len(found) - len(finite)}
    if not len(finite):
        return numbers | dict.fromkeys(("mean", *QUANTILES))
    points = np.quantile(finite, list(QUANTILES.values()))
    return numbers | {"mean": float(finite.mean())} | dict(zip(QUANTILES, map(float, points), strict=True))


def column(by_layer: Sequence[Numbers], name: str) -> list[float]:
    """One of the numbers, layer by layer; NaN where there is none, which a chart leaves out."""
    return [float("nan") if numbers.get(name) is None else float(numbers[name]) for numbers in by_layer]


def middle(by_layer: Sequence[Numbers], name: str = "q50") -> float | None:
    """The mean over the layers of one of the numbers; None without any."""
    known = [value for value in column(by_layer, name) if value == value]
    return sum(known) / len(known) if known else None


def as_text(value: float | None) -> str:
    """A number with three digits, "-" for None."""
    return "-" if value is None or value != value else f"{value:.3g}"


BANDS = (
    "layers are counted from 0; a line is the median, the darker band the middle half of the values and the lighter "
    "one the middle nine tenths"
)
"""What `draw_bands` draws, for a reader."""


def draw_bands(
    axes: Any, by_layer: Sequence[Numbers], label: str, color: Any, dashed: bool = False, outer: bool = True
) -> None:
    """Median by layer as a line, and the middle half and, if `outer`, the middle nine tenths of the values as bands."""
    layers = range(len(by_layer))
    axes.xaxis.get_major_locator().set_params(integer=True)
    line = "--" if dashed else "-"
    axes.plot(layers, column(by_layer, "q50"), line, color=color, label=label, linewidth=1.4, marker=".", markersize=4)
    for low, high, alpha in (("q25", "q75", 0.22), ("q05", "q95", 0.1))[: 1 + outer]:
        axes.fill_between(layers, column(by_layer, low), column(by_layer, high), color=color, alpha=alpha, linewidth=0)


def powers_of_ten(axes: Any) -> None:
    """A logarithmic y axis with plain numbers at its ticks, also where it spans less than a power of ten."""
    from matplotlib.ticker import LogFormatter  # slow to import, as in `figure`

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axes.tick_params(axis="y", which="minor", labelsize=8)
