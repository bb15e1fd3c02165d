"""What a run leaves: a table of its numbers and a figure of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_skip_base.console import chart_label, figure, make_table, output_console, print_next
from llava_skip_base.paths import shown

SHOWN = 4
"""Columns that the table names."""


def draw_loss(history: list[dict[str, float]], validation: list[dict[str, float]], path: Path, title: str) -> None:
    """The losses of training and validation over the steps as a PNG, from Trainer's log history."""
    with figure(path) as axes:
        axes.plot([entry["step"] for entry in history], [entry["loss"] for entry in history], linewidth=1.5)
        if validation:
            points = [(entry["step"], entry["eval_loss"]) for entry in validation]
            axes.plot(*zip(*points, strict=True), marker="o", linewidth=1.5)
            axes.legend(["training", "validation"])
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
    rows = [
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
    ]
    if validation := result.get("validation"):
        rows[2:2] = _validation_rows(result, validation)
    rows[2:2] = _benchmark_rows(result.get("benchmarks", []))
    output_console().print(make_table(f"{result['preset']} -> {output}", ("", ""), rows))
    print_next(f"llava-skip eval --model {shown(output)}; the loss curve: {output / 'loss.png'}")


def _benchmark_rows(evaluated: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The last score of each benchmark that was evaluated at checkpoints, its best one, and how many failed."""
    rows = []
    for name in dict.fromkeys(name for entry in evaluated for name in entry["scores"]):
        found = [(entry["scores"].get(name), entry["step"]) for entry in evaluated]
        scores = [(score, step) for score, step in found if score is not None]
        text = "failed at every checkpoint"
        if scores:
            best, last = max(scores), scores[-1]
            failed = f", failed at {len(found) - len(scores)} checkpoints" if len(scores) < len(found) else ""
            text = f"{last[0]:.1f} at step {last[1]}, best {best[0]:.1f} at step {best[1]}{failed}"
        rows.append((name, text))
    return rows


def _validation_rows(result: dict[str, Any], validation: list[dict[str, float]]) -> list[tuple[str, str]]:
    last, lowest = validation[-1], min(validation, key=lambda entry: entry["eval_loss"])
    return [
        ("validation loss", f"{last['eval_loss']:.4f}, lowest {lowest['eval_loss']:.4f} at step {lowest['step']}"),
        ("validation samples", f"{last['eval_samples']:.0f}, of which {last['eval_truncated']:.0f} cut to max_length"),
        ("faulty validation records dropped", f"{result['dropped_validation']}"),
        ("exported model", result["exported"]),
    ]
