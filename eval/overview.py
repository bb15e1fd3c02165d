"""All results side by side: ``python -m eval.overview results``.

A table in the terminal, and in ``results/overview``: Markdown, JSON, charts, and pages with every question and answer.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from eval.benchmarks import BENCHMARKS
from eval.scoring.intervals import CONFIDENCE
from eval.showing.charts import FEWEST_AXES, bars, radar
from eval.showing.pages import write_pages
from eval.showing.results import Result, find_results
from eval.study.statistics.scored import load_group
from eval.study.statistics.seeds import Spread, grouped, spread
from llava_skip_base.console import make_app, make_table, output_console, print_text, run_app
from llava_skip_base.files import write_json, write_text, writing
from llava_skip_base.paths import results, shown
from llava_skip_base.plain_markdown import markdown_table

MOST_AXES = 24
FOLDER = "overview"


class Overview:
    """Results as a table: a row for each benchmark, a column for each model.

    Attributes:
        models: the models' names, sorted.
        spreads: of two or more seeds of a model, by benchmark and their common name.
        benchmarks: the benchmarks' names, in the order of the command line's list.
    """

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = results
        self.models = sorted({result.model for result in results})
        known = {name: number for number, name in enumerate(BENCHMARKS)}
        names = {result.benchmark for result in results}
        self.benchmarks = sorted(names, key=lambda name: (known.get(name, len(known)), name))
        self.spreads = {key: spread(load_group(own)) for key, own in grouped(results).items()}
        self._by = {(result.benchmark, result.model): result for result in results}

    def of(self, benchmark: str) -> list[Result]:
        """The results of a benchmark, in the order of the models."""
        return [self._by[benchmark, model] for model in self.models if (benchmark, model) in self._by]

    def cells(self) -> list[list[str]]:
        """The table as text, its header first."""
        scores = self.values(lambda result: result.facts["score"])
        groups = sorted({name for _, name in self.spreads})
        rows = [
            [
                *(name, *("-" if v is None else f"{v:.1f}" for v in values)),
                *(_mean_of(self.spreads.get((name, group))) for group in groups),
            ]
            for name, values in scores.items()
        ]
        return [["benchmark", *self.models, *(f"{group}: mean of seeds" for group in groups)], *rows]

    def values(self, of: Callable[[Result], float | None]) -> dict[str, list[float | None]]:
        """Benchmark -> a value of each model's result, None where there is no result."""
        found = {key: of(result) for key, result in self._by.items()}
        return {name: [found.get((name, model)) for model in self.models] for name in self.benchmarks}

    def facts(self) -> list[dict[str, Any]]:
        """Where the number of each result comes from."""
        return [
            {
                "benchmark": result.benchmark,
                "model": result.model,
                "preset": result.facts["model"].get("preset"),
                "model_sha256": result.facts["model"].get("sha256"),
                **{name: result.facts[name] for name in ("score", "status")},
                "questions": len(result.values),
                **{name: result.facts[name] for name in ("protocol", "rule", "data")},
                **{name: result.facts.get(name) for name in ("generation", "judge", "versions")},
            }
            for result in self.results
        ]


def _mean_of(found: Spread | None) -> str:
    return "-" if found is None else f"{found.mean.value:.1f} ± {found.deviation:.1f}"


def percent(result: Result) -> float | None:
    """A headline score of 0 to 100; for a sum with another maximum (MME), the share of right answers."""
    score = result.facts["score"]
    if score is None or result.facts.get("full_score", 100.0) == 100.0:
        return score
    return 100 * sum(result.values.values()) / len(result.values) if result.values else None


def by_category(results: Sequence[Result]) -> dict[str, list[float | None]]:
    """Average the questions of each category of a benchmark file, for models that answered the same file.

    Returns:
        Category -> percent of each result; empty if there are no categories, or too many or too few for a radar chart.
    """
    if any(not result.values for result in results) or len({r.facts["data"]["sha256"] for r in results}) > 1:
        return {}
    means: dict[str, list[float | None]] = defaultdict(list)
    for result in results:
        parts: dict[str, list[float]] = defaultdict(list)
        for row in result.answers():
            if str(row["index"]) in result.values and isinstance(row.get("category"), str):
                parts[row["category"]].append(float(result.values[str(row["index"])]))
        for name, values in parts.items():
            means[name].append(100 * sum(values) / len(values))
    whole = all(len(values) == len(results) for values in means.values())
    return dict(sorted(means.items())) if whole and FEWEST_AXES <= len(means) <= MOST_AXES else {}


def write_charts(folder: Path, overview: Overview) -> list[str]:
    """Draw the charts that the results allow, and return the names of their files."""
    scores = overview.values(percent)
    bars(folder / "bars.png", overview.models, scores)
    names = ["bars.png"]
    complete = {name: values for name, values in scores.items() if None not in values}
    if len(complete) >= FEWEST_AXES:
        radar(folder / "radar.png", overview.models, complete)
        names.append("radar.png")
    for benchmark in overview.benchmarks:
        results = overview.of(benchmark)
        parts = by_category(results)
        if parts:
            names.append(f"radar-{benchmark}.png")
            radar(folder / names[-1], [result.model for result in results], parts)
    return names


def markdown(overview: Overview, charts: Sequence[str]) -> str:
    """Write the overview as Markdown: scores, charts, and where each number comes from."""
    lines = ["# Results", "", *markdown_table(overview.cells()), ""]
    lines += [f"![{name.removesuffix('.png')}]({name})" for name in charts]
    header = ["benchmark", "model", "preset", "status", "questions", "protocol", "rule", "data"]
    rows = [[*(str(fact[name]) for name in header[:-1]), fact["data"]["sha256"][:12]] for fact in overview.facts()]
    lines += ["", "## Where the numbers come from", "", *markdown_table([header, *rows]), ""]
    lines.append("`data` is the start of the file's SHA-256; `overview.json` has all of it, with the versions.")
    return "\n".join(lines) + "\n"


def write_overview(results: Sequence[Result], folder: Path) -> Overview:
    """Write Markdown, JSON, charts and pages, and return the overview, to be printed."""
    overview = Overview(results)
    charts = write_charts(folder, overview)
    write_text(folder / "overview.md", markdown(overview, charts))
    write_json(folder / "overview.json", overview.facts())
    if overview.spreads:
        spreads = [
            {"benchmark": name, "model": group, **asdict(own)} for (name, group), own in overview.spreads.items()
        ]
        write_json(folder / "seeds.json", spreads)
    benchmarks = {name: overview.of(name) for name in overview.benchmarks}
    write_pages(folder, benchmarks, overview.cells(), overview.facts(), charts)
    return overview


def print_overview(overview: Overview, folder: Path, console: Console) -> None:
    """Show the table of scores, and the page with the rest."""
    header, *rows = overview.cells()
    console.print(make_table("scores", header, rows, right=len(header) - 1))
    if overview.spreads:
        headings = ("benchmark", "model", "seeds", f"mean, {CONFIDENCE:.0%} interval", "standard deviation")
        rows = [
            [*(name, group, ", ".join(map(str, own.seeds))), str(own.mean), f"{own.deviation:.2f}"]
            for (name, group), own in overview.spreads.items()
        ]
        console.print(make_table("over seeds and questions", headings, rows))
    print_text(f"questions, answers and charts in {folder / 'index.html'}")


def run(
    places: Annotated[list[Path] | None, typer.Argument(help="Folders that hold results; results by default.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to; the first folder's overview/ by default.")] = None,
) -> None:
    """Show all results in folders and below them side by side."""
    places = places or [Path(shown(results()))]
    folder = output or places[0] / FOLDER
    found = find_results(places)
    with writing(folder):
        overview = write_overview(found, folder)
    print_overview(overview, folder, output_console())


app = make_app(run)


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
