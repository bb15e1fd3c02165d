"""Compare two results of one benchmark: ``python -m eval.compare results/mmstar/A results/mmstar/B``.

Says how far apart they are, how sure that is, and whether the choice of questions alone could explain it.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from eval.scoring.intervals import CONFIDENCE, RESAMPLES, SEED
from eval.showing.results import Result
from eval.study.statistics.pairs import Comparison, ScoreComparison, load_pair
from llava_skip_base.console import PlainTable, make_app, make_table, output_console, print_next, print_text, run_app
from llava_skip_base.files import write_json, writing


def comparison_table(a: Result, b: Result, found: Comparison, score: ScoreComparison) -> PlainTable:
    """The comparison for the terminal."""
    headings = ("", f"score, {CONFIDENCE:.0%} interval", f"mean of questions, {CONFIDENCE:.0%} interval")
    models = (("A", a, score.a, found.a), ("B", b, score.b, found.b))
    rows = [(f"{name}: {result.model}", own, mean) for name, result, own, mean in models]
    table = make_table(f"{a.benchmark}: A and B", headings, rows)
    table.add_row("B - A", str(score.difference), str(found.difference), style="bold")
    table.add_section()
    images = "" if found.images is None else f" about {found.images} images"
    table.add_row("questions", "", f"{found.questions}{images}")
    table.add_row("better in A / B only", "", f"{found.only_a} / {found.only_b}")
    if score.test != found.test:
        table.add_row(score.test, f"p = {score.p:.3g}", "")
    table.add_row(found.test, f"p = {score.p:.3g}" if score.test == found.test else "", f"p = {found.p:.3g}")
    return table


def run(
    a: Annotated[Path, typer.Argument(help="Results folder of one model on a benchmark, or its results.json.")],
    b: Annotated[Path, typer.Argument(help="Results folder of the other model on the same benchmark.")],
    json: Annotated[Path | None, typer.Option(help="Where to write the comparison as well.")] = None,
) -> None:
    """Compare two models on a benchmark: difference, confidence interval, paired test."""
    results = Result.load(a), Result.load(b)
    pair = load_pair(*results)
    found, score = pair.questions(), pair.score()
    output_console().print(comparison_table(*results, found, score))
    for note in pair.notes:
        print_text(f"note: {note}")
    verdict = "within noise" if score.within_noise else "more than noise"
    print_text(f"The difference is {verdict} at the {CONFIDENCE:.0%} level (p = {score.p:.3g}).")
    if json:
        named = {name: {"folder": str(r.folder), **r.facts} for name, r in zip(("a", "b"), results, strict=True)}
        method = {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED}
        with writing(json):
            facts = {"score": asdict(score), "notes": pair.notes, "method": method, "results": named}
            write_json(json, {**asdict(found), **facts})
    print_next("llava-skip overview shows the questions that only one of the two answers right")


app = make_app(run)


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
