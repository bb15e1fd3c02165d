"""What was measured, for people: tables for the terminal and Markdown, and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.study.speed.subjects import STOCK
from llava_skip_base.console import chart_label, figure
from llava_skip_base.plain_markdown import markdown_table, markdown_text

Row = dict[str, Any]
Table = list[list[str]]
"""Cells, the headings first."""
MIB = 2**20

STEPS = {"train_step": "training step", "prefill": "prefill", "first_token": "first token, through generate"}
"""Measurements of whole steps, each with a table."""
STEP_HEADINGS = ("model", "ms", "spread", "of dense", "FLOP ideal", "over ideal", "TFLOP/s", "peak MiB")
NOTES = (
    "ms is the fastest of the rounds, in which the models take turns; the spread is how far the median is above it.",
    "of dense is the ratio to the dense model of the same front end, of transformers LLaVA to this project's dense "
    "model. FLOP ideal is the same ratio in FLOPs of the whole step by formula; over ideal is one by the other.",
    "Peak MiB is what a call holds at most beyond weights and optimizer states.",
)


def _number(row: Row, name: str, form: str, scale: float = 1.0) -> str:
    value = row.get(name)
    return "-" if value is None else format(value * scale, form)


def step_table(rows: Sequence[Row], kind: str) -> Table:
    """A table of one measurement of whole steps."""
    table = [list(STEP_HEADINGS)]
    shows_mfu = any("mfu" in row for row in rows)
    if shows_mfu:
        table[0].append("MFU")
    for row in rows:
        if row["measurement"] == kind:
            cells = [_number(row, "seconds", ".1f", 1000), _number(row, "spread", ".1%")]
            cells += [_number(row, name, ".3f") for name in ("ratio", "flop_ratio", "over_ideal")]
            cells += [_number(row, "tflops_a_second", ".3g"), _number(row, "peak_bytes", ".1f", 1 / MIB)]
            cells += [_number(row, "mfu", ".1%")] if shows_mfu else []
            table.append([row["name"], *cells])
    return table


def decode_table(rows: Sequence[Row], caches: Sequence[Row]) -> Table:
    """Tokens a second of each model: through `generate`, at each batch, and at the budget of memory."""
    kinds = [kind for kind in dict.fromkeys(row["measurement"] for row in rows) if kind.startswith("decode_")]
    kinds = ["next_token", *kinds]
    by_place = {(row["measurement"], row["name"]): row for row in rows}
    names = {"next_token": "generate", "decode_budget": "equal memory (samples)"}
    headings = [names.get(kind, kind.replace("decode_", "batch ")) for kind in kinds]
    table = [["model", "cache MiB a sample", "with room to grow", *headings]]
    for cache in caches:
        cells = [f"{cache['stored_bytes'] / MIB:.2f}", f"{cache['held_bytes'] / MIB:.2f}"]
        for kind in kinds:
            row = by_place.get((kind, cache["name"]))
            if row is None:
                cells.append("-")
                continue
            share = f", {1 / row['ratio']:.2f}x" if "ratio" in row else ""
            samples = f" ({row['samples']})" if kind == "decode_budget" else ""
            cells.append(f"{row['samples'] / row['seconds']:.1f}{share}{samples}")
        table.append([cache["name"], *cells])
    return table


def image_table(rows: Sequence[Row]) -> Table:
    """What comes before the language model, and the merge in it."""
    table = [["model", "images ms", "TFLOP/s", "of the prefill", "merge ms", "merge peak MiB"]]
    by_place = {(row["measurement"], row["name"]): row for row in rows}
    for row in rows:
        if row["measurement"] == "images":
            merge, prefill = (by_place.get((kind, row["name"]), {}) for kind in ("merge", "prefill"))
            share = f"{row['seconds'] / prefill['seconds']:.1%}" if prefill else "-"
            cells = [_number(row, "seconds", ".1f", 1000), _number(row, "tflops_a_second", ".3g"), share]
            cells += [_number(merge, "seconds", ".2f", 1000), _number(merge, "peak_bytes", ".1f", 1 / MIB)]
            table.append([row["name"], *cells])
    return table


def failed_table(rows: Sequence[Row]) -> Table:
    """What could not be measured, and why."""
    failed = [row for row in rows if row["measurement"] == "failed"]
    return [["model", "not measured"], *([row["name"], row["reason"]] for row in failed)]


def whole_tables(result: Mapping[str, Any]) -> dict[str, Table]:
    """All tables of a measurement of whole models, by title; those without rows are left out."""
    rows, caches = result["rows"], result["caches"]
    tables = {title: step_table(rows, kind) for kind, title in STEPS.items()}
    tables["decoding: tokens a second, and times dense"] = decode_table(rows, caches)
    tables["before the language model"] = image_table(rows)
    tables["not measured"] = failed_table(rows)
    return {title: table for title, table in tables.items() if len(table) > 1}


def facts_line(facts: Mapping[str, Any]) -> str:
    """Device, size and batch in a line."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())


def markdown_page(
    title: str, facts: Mapping[str, Any], tables: Mapping[str, Table], notes: Sequence[str], pictures: Sequence[str]
) -> str:
    """A page of tables."""
    lines = [f"# {markdown_text(title)}", "", markdown_text(facts_line(facts)) + ".", ""]
    for note in notes:
        lines += [markdown_text(note), ""]
    for name, table in tables.items():
        lines += [f"## {markdown_text(name[0].upper() + name[1:])}", "", *markdown_table(table), ""]
    lines += [f"![{Path(picture).stem}]({picture})\n" for picture in pictures]
    return "\n".join(lines).rstrip() + "\n"


def draw_whole(rows: Sequence[Row], path: Path, title: str) -> None:
    """Bars of the measured ratios next to the ideal ones, for training step and prefill."""
    kinds = [kind for kind in ("train_step", "prefill") if any(row["measurement"] == kind for row in rows)]
    with figure(path, (5.5 * max(1, len(kinds)), 4.5), ncols=max(1, len(kinds)), squeeze=False) as axes:
        for axis, kind in zip(axes[0], kinds, strict=False):
            own = [row for row in rows if row["measurement"] == kind and row["name"] != row["reference"]]
            places = range(len(own))
            axis.bar([p - 0.2 for p in places], [row.get("ratio", 0) for row in own], 0.4, label="measured")
            ideal = [row.get("flop_ratio", 1.0 if row["name"] == STOCK else 0) for row in own]
            axis.bar([p + 0.2 for p in places], ideal, 0.4, label="FLOP ideal", color="lightgray")
            axis.axhline(1.0, color="black", linewidth=0.8)
            axis.set_xticks(list(places), [chart_label(row["name"]) for row in own], rotation=30, ha="right")
            axis.set(ylabel="time, dense = 1", title=chart_label(f"{STEPS[kind]}, {title}"))
            axis.legend()
