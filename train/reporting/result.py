"""What a run leaves: a table of its numbers and a figure of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_skip_base.console import chart_label, figure, make_table, output_console, print_next
from llava_skip_base.paths import shown

SHOWN = 4
"""Columns that the table names."""


def draw_loss(history: list[dict[str, float]], path: Path, title: str) -> None:
    """The loss over the steps as a PNG, from Trainer's log history."""
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    with figure(path) as axes:
        axes.plot([step for step, _ in points], [loss for _, loss in points], linewidth=1.5)
        axes.set(xlabel="step", ylabel="loss (nats a token)", title=chart_label(title), yscale="log")
        axes.grid(alpha=0.3, which="both")


def _unread(result: dict[str, Any]) -> str:
    """The columns of the data that nothing read, and in how many records; of a stream only in how many samples."""
    if columns := result.get("unread_columns"):
        more = f" and {len(columns) - SHOWN} more" if len(columns) > SHOWN else ""
        return ", ".join(f"{name} in {count:,}" for name, count in list(columns.items())[:SHOWN]) + more
    samples = int(result.get("unread", 0))
    return f"in {samples:,} samples" if samples else "none"


def show_result(result: dict[str, Any], output: Path) -> None:
    """Print the table, and what to do next."""
    rows = (
        ("steps", f"{result['steps']}"),
        ("final loss", f"{result['final_loss']:.4f}"),
        ("tokens/s", f"{result['tokens_per_second']:,.0f}"),
        ("samples/s", f"{result['samples_per_second']:,.1f}"),
        ("tokens that skipped the FFN", f"{result['skipped_ffn_share']:.1%}"),
        ("faulty records dropped", f"{result.get('dropped', 0)}"),
        ("columns that nothing reads", _unread(result)),
        ("samples cut to max_length", f"{result['truncated']:.0f}"),
        ("samples without supervised tokens", f"{result.get('unsupervised', 0):.0f}"),
        ("seconds", f"{result['seconds']:.1f}"),
    )
    output_console().print(make_table(f"{result['preset']} -> {output}", ("", ""), rows))
    print_next(f"llava-skip eval --model {shown(output)}; the loss curve: {output / 'loss.png'}")
