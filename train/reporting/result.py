"""What a run leaves behind: a table, JSON, and a picture of the loss."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def as_json(content: Any) -> Any:
    """What `content` is once it has been written as JSON and read again."""
    return json.loads(json.dumps(content, default=str))


def load_json(path: Path) -> Any:
    """A small JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text whole or not at all: into a temporary file that then takes the name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def draw_loss(history: list[dict[str, float]], path: Path, title: str) -> None:
    """The loss over the steps as a PNG, from Trainer's log history."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([step for step, _ in points], [loss for _, loss in points], linewidth=1.5)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title, yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show_result(result: dict[str, Any], output: Path) -> None:
    """The closing table."""
    table = Table(title=f"{result['preset']} -> {output}", show_header=False)
    for name, text in (
        ("steps", f"{result['steps']}"),
        ("final loss", f"{result['final_loss']:.4f}"),
        ("tokens/s", f"{result['tokens_per_second']:,.0f}"),
        ("samples/s", f"{result['samples_per_second']:,.1f}"),
        ("tokens that skipped the FFN", f"{result['skipped_ffn_share']:.1%}"),
        ("faulty records dropped", f"{result.get('dropped', 0)}"),
        ("samples cut to max_length", f"{result['truncated']:.0f}"),
        ("samples with nothing to learn", f"{result.get('unsupervised', 0):.0f}"),
        ("seconds", f"{result['seconds']:.1f}"),
    ):
        table.add_row(name, text)
    Console().print(table)
