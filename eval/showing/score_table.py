"""The table of a score."""

from collections.abc import Iterator, Mapping
from typing import Any

from eval.sample import Score
from eval.scoring.intervals import CONFIDENCE, Interval
from llava_skip_base.console import PlainTable, make_table


def score_table(title: str, score: Score, interval: Interval | None = None) -> PlainTable:
    """The values of a score for the terminal, the headline last, with its interval if there is one."""
    values = [(name, f"{value:.4f}" if isinstance(value, float) else value) for name, value in _flat(score.scores)]
    table = make_table(title, ("part", "value"), values, right=1)
    table.add_section()
    table.add_row(f"score, {score.rule}", "-" if score.score is None else f"{score.score:.1f}", style="bold")
    if interval:
        table.add_row(f"{CONFIDENCE:.0%} interval", f"{interval.low:.1f} to {interval.high:.1f}")
    return table


def _flat(scores: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} / ")
        else:
            yield f"{prefix}{name}", value
