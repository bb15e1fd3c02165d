"""What a comparison can detect before it is run: ``llava-skip power mmstar`` or ``--questions 1500``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from eval.answering.plan import embedded_file
from eval.benchmarks import BENCHMARKS, get_benchmark
from eval.reading.images import image_keys
from eval.scoring.intervals import CONFIDENCE, numbered
from eval.showing.results import Result
from eval.study.statistics.pairs import Pair, load_pair
from eval.study.statistics.power import (
    POWER,
    Design,
    detectable,
    detectable_by_pair,
    independent_discordance,
    mean_size,
    measured,
)
from llava_skip_base.console import PlainTable, make_table, output_console, print_next, print_text, program
from llava_skip_base.errors import UserError
from llava_skip_base.files import write_json, writing

CORRELATION = 0.1
"""Taken for the correlation within an image where nothing was measured."""


def sizes(
    benchmark: str | None, data: Path | None, images: Path | None, questions: int | None, image_count: int | None
) -> tuple[int, float]:
    """The number of questions, and the questions that share an image, from a benchmark file or as they are given.

    Raises:
        UserError: neither is given, or both.
    """
    if (benchmark is None) == (questions is None):
        raise UserError(f"give a benchmark ({', '.join(BENCHMARKS)}), or --questions with --images-count.")
    if benchmark is None:
        if data or images:
            raise UserError("--data and --images are a benchmark's files: name the benchmark.")
        if questions is None or questions < 1 or not 1 <= (image_count or questions) <= questions:
            raise UserError("--questions and --images-count must be 1 or more, and images no more than questions.")
        return questions, questions / (image_count or questions)
    if image_count is not None:
        raise UserError("--images-count is for --questions: the images of a benchmark file are counted.")
    chosen = get_benchmark(benchmark)
    samples = chosen.load(data or embedded_file(chosen), images)
    keys = image_keys(samples)
    asked = {str(chosen.question(sample.id)): keys.get(str(sample.id), str(sample.id)) for sample in samples[::-1]}
    return len(asked), mean_size(numbered(list(asked.values())))


def design_of(
    counted: tuple[int, float], pair: Pair | None, accuracy: float, discordance: float | None, correlation: float | None
) -> tuple[Design, list[str]]:
    """The comparison as it is assumed or was measured, and where its numbers come from."""
    notes = []
    found = measured(pair) if pair else None
    if discordance is None and found:
        discordance = found.discordance
        notes.append("discordance: that of the pair of results.")
    elif discordance is None:
        discordance = independent_discordance(accuracy)
        notes.append(
            f"discordance: that of unrelated models with {accuracy:.0%} right answers; models of one family agree more "
            "often, and a pair of results (--pair A B) tells how often."
        )
    if correlation is None and found:
        correlation = found.correlation
        notes.append("correlation within images: that of the pair of results.")
    elif correlation is None:
        correlation = CORRELATION if counted[1] > 1 else 0.0
        if correlation:
            notes.append(f"correlation within images: {correlation} is assumed (--correlation).")
    return Design(*counted, discordance, correlation), notes


def power_table(title: str, design: Design, points: float | None, score: float | None, benchmarks: int) -> PlainTable:
    """The numbers for the terminal, what can be detected last."""
    rows = [
        ("questions", f"{design.questions}"),
        ("questions that share an image, on average", f"{design.size:.2f}"),
        ("share of questions that one model alone answers right", f"{design.discordance:.1%}"),
        ("correlation within images", f"{design.correlation:.3f}"),
        ("independent questions that tell as much", f"{design.independent:.0f}"),
        ("benchmarks corrected for", f"{benchmarks}"),
    ]
    table = make_table(title, ("", ""), rows, right=1)
    table.add_section()
    shown = "none" if points is None else f"{points:.2f} points"
    table.add_row("smallest difference detected, share of right answers", shown, style="bold")
    if score is not None:
        table.add_row("smallest difference detected, the benchmark's score", f"{score:.2f} points", style="bold")
    return table


def run(
    benchmark: Annotated[str | None, typer.Argument(help=", ".join(BENCHMARKS))] = None,
    data: Annotated[Path | None, typer.Option(help="Benchmark file; the embedded one by default.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of image files.")] = None,
    questions: Annotated[int | None, typer.Option(help="Instead of a benchmark: the number of its questions.")] = None,
    images_count: Annotated[int | None, typer.Option(help="And of its images, if questions share them.")] = None,
    accuracy: Annotated[float, typer.Option(help="Expected share of right answers, 0 to 1.")] = 0.6,
    discordance: Annotated[
        float | None, typer.Option(help="Share of questions that one of the two models alone answers right, 0 to 1.")
    ] = None,
    correlation: Annotated[
        float | None, typer.Option(help="Correlation of the differences of questions about one image.")
    ] = None,
    pair: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two results to measure both from, on this or a like benchmark.")
    ] = None,
    benchmarks: Annotated[int, typer.Option(help="Number of benchmarks that Holm's procedure corrects for.")] = 1,
    power: Annotated[float, typer.Option(help="Probability of detecting the difference.")] = POWER,
    alpha: Annotated[float, typer.Option(help="Probability of a false difference.")] = round(1 - CONFIDENCE, 10),
    json: Annotated[Path | None, typer.Option(help="Where to write the numbers as well.")] = None,
) -> None:
    """Say how large a difference of two models must be for a comparison to find it."""
    shares = {"--accuracy": accuracy, "--discordance": discordance, "--power": power, "--alpha": alpha}
    for name, value in shares.items():
        if value is not None and not 0 < value < 1:
            raise UserError(f"{name} is {value}; expected a number between 0 and 1.")
    if correlation is not None and not 0 <= correlation <= 1:
        raise UserError(f"--correlation is {correlation}; expected a number from 0 to 1.")
    if benchmarks < 1:
        raise UserError(f"--benchmarks is {benchmarks}; expected 1 or more.")
    counted = sizes(benchmark, data, images, questions, images_count)
    loaded = load_pair(Result.load(pair[0]), Result.load(pair[1])) if pair else None
    design, notes = design_of(counted, loaded, accuracy, discordance, correlation)
    points = detectable(design, benchmarks, power, alpha)
    same = loaded is not None and loaded.a.result.benchmark == benchmark and len(loaded.ids) == design.questions
    score = detectable_by_pair(loaded, benchmarks, power, alpha) if loaded and same else None
    title = f"{benchmark or 'comparison'}: power {100 * power:g}%, level {100 * alpha:g}%"
    output_console().print(power_table(title, design, points, score, benchmarks))
    for note in (*notes, *(loaded.notes if loaded else ())):
        print_text(f"note: {note}")
    if design.discordance == 0:
        print_text("The pair of results is equal on every question: give --discordance, or results that differ.")
    elif points is None:
        print_text("With so few questions no difference would be found; take more questions or another benchmark.")
    if json:
        facts = {"design": asdict(design), "independent_questions": design.independent, "power": power, "alpha": alpha}
        with writing(json):
            write_json(json, {**facts, "benchmarks": benchmarks, "points": points, "score_points": score})
    print_next("llava-skip eval, then llava-skip compare")


def main() -> None:
    """Run the command line."""
    program(run)


if __name__ == "__main__":
    main()
