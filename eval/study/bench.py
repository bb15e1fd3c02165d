"""How fast models are, on random weights: `llava-skip bench whole`, `bench growth`, `bench device`.

`whole` measures a training step, a prefill, an answer, decoding and memory of every preset, beside the FLOPs and beside
transformers' own LLaVA. `growth` says how time and memory grow with images, text and batch. `device` writes the page of
a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from eval.answering.clock import device_name
from eval.study.speed import growth as growing
from eval.study.speed import page
from eval.study.speed.device import DEVICE_NOTES, DEVICE_PARTS, DeviceStudy, device_tables, page_name
from eval.study.speed.measuring import Rounds
from eval.study.speed.sizes import BENCH_SIZES
from eval.study.speed.subjects import Shape, build_subjects
from eval.study.speed.whole import Plan, dtype_on, measure_whole
from llava_skip_base.console import make_app, make_table, output_console, print_next, run_app
from llava_skip_base.errors import UserError
from llava_skip_base.files import write_json, write_text
from llava_skip_base.paths import home, results, shown

WHOLE = "llava,sv-llava-100,sv-llava-256,llava-hd,sv-llava-hd,cos,sv-cos"
"""The presets of the paper's table 1."""
ATTENTION = "sdpa,flash_attention_2,flex_attention,eager"
"""Implementations of transformers; the page says which ones a machine does not have, and why."""

Size = Annotated[str, typer.Option(help=f"Widths: {', '.join(BENCH_SIZES)}.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Presets = Annotated[str, typer.Option(help="Presets, separated by commas; each is compared with its dense one.")]
Repeats = Annotated[int, typer.Option(min=1, help="Least rounds in which the models take turns.")]
Seconds = Annotated[float, typer.Option(min=0, help="Short calls get up to ten times the rounds, for this long.")]
Batch = Annotated[int, typer.Option(min=1, help="Samples of a training step and a prefill.")]
Text = Annotated[int, typer.Option(min=4, help="Tokens of text of a sample; half of them are supervised.")]
Steps = Annotated[int, typer.Option(min=2, help="New tokens of an answer and of a decode measurement.")]
Output = Annotated[Path | None, typer.Option(help="Folder of JSON, Markdown and chart.")]


def check_device(device: str) -> None:
    """Use one thread on a CPU; a GPU must be there.

    Raises:
        UserError: there is no such device.
    """
    if device == "cpu":
        torch.set_num_threads(1)
    elif device != "cuda":
        raise UserError(f"--device is {device!r}; it is cpu or cuda.")
    elif not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu, or install torch for CUDA.")


def facts_of(device: str, size: str, **others: Any) -> dict[str, Any]:
    """What the numbers depend on."""
    facts: dict[str, Any] = {"device": device_name(device), "size": size, **others}
    facts["dtype"] = str(dtype_on(device)).removeprefix("torch.")
    return facts | {"torch": torch.__version__, "transformers": transformers.__version__}


def write_out(output: Path, name: str, result: dict[str, Any], text: str, tables: dict[str, page.Table]) -> None:
    """Write JSON and Markdown, and print the tables."""
    write_json(output / f"{name}.json", result)
    write_text(output / f"{name}.md", text)
    for title, table in tables.items():
        output_console().print(make_table(title, table[0], table[1:], right=len(table[0]) - 1))
    print_next(f"open {shown(output / name)}.md; the figures are in {shown(output / name)}.json")


def whole(
    size: Size = "width-512",
    device: Device = "cpu",
    presets: Presets = WHOLE,
    batch: Batch = 1,
    text: Text = 100,
    repeats: Repeats = 3,
    seconds: Seconds = 1.0,
    decode: Annotated[str, typer.Option(help="Batches that decode, separated by commas.")] = "1,4,16",
    steps: Steps = 8,
    budget_mib: Annotated[
        float | None, typer.Option(help="Memory of the caches that decode together; default: 4 of the largest.")
    ] = None,
    output: Output = None,
) -> None:
    """Measure training step, prefill, answer, decoding and memory of presets, beside FLOPs and transformers' LLaVA."""
    check_device(device)
    output = output or results() / "bench"
    budget = None if budget_mib is None else int(budget_mib * page.MIB)
    plan = Plan(Shape(batch, 1, text), Rounds(repeats, seconds), numbers(decode, "--decode"), steps, budget)
    subjects = build_subjects(names(presets, "--presets"), size, device, dtype_on(device))
    outcome = measure_whole(subjects, plan)
    facts = facts_of(device, size, batch=batch, text_tokens=text, rounds=repeats)
    result = {**facts, "rows": outcome.rows, "caches": outcome.caches}
    page.draw_whole(outcome.rows, output / f"{size}.png", size)
    tables = page.whole_tables(result)
    text_page = page.markdown_page(f"Speed at {size}", facts, tables, page.NOTES, [f"{size}.png"])
    write_out(output, size, result, text_page, tables)


def growth(
    size: Size = "tiny",
    device: Device = "cpu",
    presets: Presets = "llava,sv-llava-256,llava-hd,sv-llava-hd,cos,sv-cos",
    text: Text = 100,
    repeats: Repeats = 3,
    seconds: Seconds = 1.0,
    images: Annotated[str, typer.Option(help="Images of a sample, separated by commas.")] = "1,2,4,8",
    texts: Annotated[str, typer.Option(help="Tokens of text of a sample, separated by commas.")] = "100,200,400,800",
    batches: Annotated[str, typer.Option(help="Samples of a batch, separated by commas.")] = "1,2,4,8",
    output: Output = None,
) -> None:
    """Measure how time and memory grow with images, text and batch, and fit exponents."""
    check_device(device)
    output = output or results() / "bench"
    found = {"images": numbers(images, "--images"), "text": numbers(texts, "--texts")}
    values = {
        name: tuple(sorted(set(own))) for name, own in {**found, "samples": numbers(batches, "--batches")}.items()
    }
    subjects = build_subjects(names(presets, "--presets"), size, device, dtype_on(device), stock=False)
    rows = growing.measure_growth(subjects, growing.Growth(Shape(1, 1, text), values, Rounds(repeats, seconds)))
    fits = growing.fit(rows)
    facts = facts_of(device, size, text_tokens=text, rounds=repeats)
    tables = {"exponents": growing.growth_table(fits), "not measured": page.failed_table(rows)}
    tables = {title: table for title, table in tables.items() if len(table) > 1}
    name = f"growth-{size}"
    growing.draw_growth(rows, output / f"{name}.png")
    text_page = page.markdown_page(f"Growth at {size}", facts, tables, growing.NOTES, [f"{name}.png"])
    write_out(output, name, {**facts, "rows": rows, "fits": fits}, text_page, tables)


def device(
    device: Device = "cuda",
    size: Size = "llama3-8b",
    presets: Presets = WHOLE,
    batch: Batch = 1,
    text: Text = 100,
    repeats: Repeats = 3,
    seconds: Seconds = 1.0,
    steps: Steps = 32,
    attention: Annotated[str, typer.Option(help="Implementations, separated by commas.")] = ATTENTION,
    compared: Annotated[str, typer.Option(help="Presets of attention and cache comparisons.")] = "llava,sv-llava-256",
    parts: Annotated[str, typer.Option(help="Parts of the page, separated by commas.")] = ",".join(DEVICE_PARTS),
    output: Annotated[Path | None, typer.Option(help="Folder of the page; default: docs, of a CPU results.")] = None,
) -> None:
    """Write the page of a device: agreement, attention, presets at true widths, CUDA graphs, memory, MFU."""
    check_device(device)
    chosen = names(parts, "--parts")
    if unknown := [part for part in chosen if part not in DEVICE_PARTS]:
        raise UserError(f"--parts has {', '.join(unknown)}; known: {', '.join(DEVICE_PARTS)}.")
    folder = output or (home() / "docs" if device == "cuda" else results() / "bench")
    shape, rounds = Shape(batch, 1, text), Rounds(repeats, seconds)
    models, pair, ways = names(presets, "--presets"), names(compared, "--compared"), names(attention, "--attention")
    study = DeviceStudy(device, size, models, pair, ways, shape, rounds, steps)
    facts = facts_of(device, size, batch=batch, text_tokens=text, rounds=repeats)
    name = page_name(facts["device"], device)
    sections: dict[str, Any] = {}
    for part in chosen:
        sections[part] = study.measure(part)
        tables = device_tables(sections)
        pictures = [f"{name}.png"] if "whole" in sections else []
        text_page = page.markdown_page(f"Measured on {facts['device']}", facts, tables, DEVICE_NOTES, pictures)
        if pictures:
            page.draw_whole(sections["whole"]["rows"], folder / f"{name}.png", size)
        write_json(folder / f"{name}.json", {**facts, **sections})
        write_text(folder / f"{name}.md", text_page)
    write_out(folder, name, {**facts, **sections}, text_page, tables)


def names(text: str, option: str) -> list[str]:
    """The names of an option that separates them by commas.

    Raises:
        UserError: there is none.
    """
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise UserError(f"{option} is {text!r}; give names, separated by commas.")
    return found


def numbers(text: str, option: str) -> tuple[int, ...]:
    """The positive numbers of an option that separates them by commas.

    Raises:
        UserError: one is none.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"{option} is {text!r}; give positive numbers, separated by commas.")
    return tuple(map(int, parts))


app = make_app(whole, growth, device)


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
