"""Compare two results of one benchmark, or two models on all benchmarks that both were evaluated on.

``python -m eval.compare results/mmstar/A results/mmstar/B``, or ``python -m eval.compare --models A B``. Says how far
apart they are, how sure that is, and whether the choice of questions alone could explain it.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from eval.scoring.intervals import CONFIDENCE, RESAMPLES, SEED, Interval
from eval.showing.results import Result, find_results
from eval.study.statistics.loyalty import loyalty
from eval.study.statistics.many import Average, Row, compare_many, contests, has_answers, results_of
from eval.study.statistics.pairs import Comparison, Pair, load_pair
from eval.study.statistics.vtc import DIFFICULT, GROUP_A, GROUP_B, SIMPLE, by_difficulty, is_downsampled
from llava_skip_base.console import (
    PlainTable,
    chart_label,
    figure,
    make_app,
    make_table,
    output_console,
    print_next,
    print_text,
    run_app,
)
from llava_skip_base.errors import UserError
from llava_skip_base.files import write_json, writing
from llava_skip_base.paths import results, shown

METHOD = {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED}
_INTERVAL = f"{CONFIDENCE:.0%} interval"


def comparison_table(pair: Pair, found: Comparison, same: Interval | None) -> PlainTable:
    """The comparison for the terminal."""
    headings = ("", f"score, {_INTERVAL}", f"mean of questions, {_INTERVAL}")
    score = pair.score()
    models = (("A", pair.a, score.a, found.a), ("B", pair.b, score.b, found.b))
    rows = [(f"{name}: {own.result.model}", value, mean) for name, own, value, mean in models]
    table = make_table(f"{pair.a.result.benchmark}: A and B", headings, rows)
    table.add_row("B - A", str(score.difference), str(found.difference), style="bold")
    table.add_section()
    images = "" if found.images is None else f" about {found.images} images"
    table.add_row("questions", "", f"{found.questions}{images}")
    table.add_row("better in A / B only", "", f"{found.only_a} / {found.only_b}")
    if same:
        table.add_row("answers that A and B share (%)", "", str(same))
    if score.test != found.test:
        table.add_row(score.test, f"p = {score.p:.3g}", "")
    table.add_row(found.test, f"p = {score.p:.3g}" if score.test == found.test else "", f"p = {found.p:.3g}")
    return table


def difficulty_table(groups: dict[str, Comparison | None]) -> PlainTable:
    """The comparison on the questions that a smaller image gets wrong, and on the others."""
    titles = {DIFFICULT: "wrong with a smaller image", SIMPLE: "right with a smaller image"}
    titles |= {GROUP_A: "the first, where A is right", GROUP_B: "the second, where A is right"}
    rows = [
        (titles[name], found.questions, found.a, found.b, found.difference, f"{found.p:.3g}")
        if found
        else (titles[name], 0, *"----")
        for name, found in groups.items()
    ]
    return make_table(f"mean of questions, {_INTERVAL}", ("questions that are", "", "A", "B", "B - A", "p"), rows)


def many_table(names: tuple[str, str], rows: Sequence[Row], mean: Average) -> PlainTable:
    """All benchmarks for the terminal, and their average."""
    sides = (f"A: {names[0]}", f"B: {names[1]}", f"B - A, {_INTERVAL}")
    headings = ("benchmark", "questions", "images", *sides, "p", "Holm")
    lines = [
        (
            *(row.benchmark, row.questions, row.images or "", f"{row.a.value:.1f}", f"{row.b.value:.1f}"),
            *(row.difference, f"{row.p:.3g}", f"{row.adjusted:.3g}"),
        )
        for row in rows
    ]
    table = make_table(f"{names[0]} and {names[1]}", headings, lines)
    table.add_section()
    table.add_row(
        *("average (% of the highest score)", "", "", f"{mean.a:.1f}", f"{mean.b:.1f}"),
        *(str(mean.difference), f"{mean.p:.3g}", ""),
        style="bold",
    )
    return table


def draw_many(path: Path, names: tuple[str, str], rows: Sequence[Row], mean: Average, scales: Sequence[float]) -> None:
    """Draw the differences with their intervals, in percent of each benchmark's highest score, the average last."""
    found = [(row.benchmark, row.difference, scale) for row, scale in zip(rows, scales, strict=True)]
    found.append(("average", mean.difference, 1.0))
    with figure(path, (7, 1.2 + 0.35 * len(found))) as axes:
        for place, (_, value, scale) in enumerate(found):
            ends = [[scale * (value.value - value.low)], [scale * (value.high - value.value)]]
            axes.errorbar([scale * value.value], [place], xerr=ends, fmt="o", capsize=3, color="C0")
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set_yticks(range(len(found)), [chart_label(name) for name, _, _ in found])
        axes.invert_yaxis()
        axes.set_xlabel(chart_label(f"{names[1]} minus {names[0]}, % of the highest score, {_INTERVAL}"))


def compare_two(a: Result, b: Result, filtered: Result | None, json: Path | None) -> None:
    """Compare two results of one benchmark."""
    pair = load_pair(a, b)
    found, notes = pair.questions(), list(pair.notes)
    same = loyalty(b, a, pair.a.keys) if has_answers(pair) else None
    output_console().print(comparison_table(pair, found, same))
    groups: dict[str, Comparison | None] = {}
    if filtered:
        groups = by_difficulty(pair, filtered)
        output_console().print(difficulty_table(groups))
        if not is_downsampled(filtered):
            notes.append(f"{filtered.folder} does not say that its images were down-sampled (--reduction downsample).")
    _print_notes(notes)
    score = pair.score()
    verdict = "within noise" if score.within_noise else "more than noise"
    print_text(f"The difference is {verdict} at the {CONFIDENCE:.0%} level (p = {score.p:.3g}).")
    if json:
        named = {name: {"folder": str(r.folder), **r.facts} for name, r in (("a", a), ("b", b))}
        facts: dict[str, Any] = {"score": asdict(score), "loyalty": same and asdict(same), "notes": notes}
        if filtered:
            parts = {name: group and asdict(group) for name, group in groups.items()}
            facts["filter"] = {"folder": str(filtered.folder), **parts}
        with writing(json):
            write_json(json, {**asdict(found), "method": METHOD, "results": named, **facts})
    print_next("llava-skip overview shows the questions that only one of the two answers right")


def compare_models(names: tuple[str, str], a: Sequence[Result], b: Sequence[Result], json: Path | None) -> None:
    """Compare two models, each with one seed or several, on all benchmarks that they share."""
    shared = contests(a, b)
    rows, mean = compare_many(shared)
    output_console().print(many_table(names, rows, mean))
    notes = list(dict.fromkeys(note for contest in shared for note in contest.notes))
    counts = [max(len(getattr(contest, name)) for contest in shared) for name in ("a", "b")]
    if max(counts) > 1 and min(counts) == 1:
        notes.append(f"{names[counts.index(1)]} has one seed: how much another seed of it would differ is not in p.")
    _print_notes(notes)
    sure = [row.benchmark for row in rows if row.adjusted <= 1 - CONFIDENCE]
    told = f"on {', '.join(sure)}" if sure else "on no benchmark"
    print_text(f"The difference is more than noise {told}, at the {CONFIDENCE:.0%} level for all {len(rows)} together.")
    if json:
        chart = json.with_suffix(".png")
        with writing(json):
            facts = {"models": names, "seeds": counts, "benchmarks": [asdict(row) for row in rows]}
            write_json(json, {**facts, "average": asdict(mean), "correction": "Holm", "method": METHOD, "notes": notes})
            draw_many(chart, names, rows, mean, [contest.scale for contest in shared])
        print_text(f"written to {json}, with a chart in {chart}")


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print_text(f"note: {note}")


def run(
    a: Annotated[
        Path | None, typer.Argument(help="Results folder of one model on a benchmark, its results.json, or of several.")
    ] = None,
    b: Annotated[Path | None, typer.Argument(help="That of the other model.")] = None,
    models: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Names of two models, or of two groups NAME-seed-N, to compare on all they share."),
    ] = None,
    results_in: Annotated[Path | None, typer.Option("--results", help="Where --models are looked for.")] = None,
    filtered: Annotated[
        Path | None,
        typer.Option("--filter", help="Also by whether this result, the dense model's with a smaller image, is right."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Where to write the comparison as well.")] = None,
) -> None:
    """Compare two models on a benchmark, or on all: difference, confidence interval, paired test."""
    if models:
        if a or b or filtered:
            raise UserError("--models compares on all benchmarks: leave out the folders and --filter.")
        place = results_in or Path(shown(results()))
        one, other = (results_of(name, [place]) for name in models)
        compare_models(models, one, other, json)
        return
    if a is None or b is None or results_in:
        raise UserError("give two results folders, or --models A B (with --results, where they are).")
    if _is_one(a) or _is_one(b):
        compare_two(Result.load(a), Result.load(b), Result.load(filtered) if filtered else None, json)
    elif filtered:
        raise UserError("--filter is for two results of one benchmark: give their folders.")
    else:
        compare_models((a.name, b.name), find_results([a]), find_results([b]), json)


def _is_one(path: Path) -> bool:
    """Whether a path is meant as one result: it holds one, or there is none below it either."""
    return path.name == "results.json" or (path / "results.json").is_file() or not any(path.glob("*/**/results.json"))


app = make_app(run)


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
