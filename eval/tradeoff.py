"""Score against cost: ``llava-skip tradeoff --model DENSE --model SKIPPING --methods random,grid --budgets 18,12``.

Every dense model with every method at every budget, and every other model as it is, on one set of questions.
"""

import shlex
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eval import options
from eval.answering.plan import ALL, Run, chosen_benchmarks, plan_runs
from eval.benchmarks import BENCHMARKS
from eval.run import evaluate
from eval.sample import Score
from eval.showing.results import Result
from eval.showing.tradeoff import short_table, write_page, write_tradeoff
from eval.study.candidates import Candidate, plan_candidates
from eval.study.tradeoff import against, make_row
from eval.versions import versions
from llava_skip_base.console import make_app, output_console, print_error, print_next, print_text, run_app
from llava_skip_base.errors import UserError
from llava_skip_base.files import writing
from llava_skip_base.paths import results, shown

if TYPE_CHECKING:
    from eval.answering.generate import Numerics


def evaluate_all(runs: Sequence[Run], processes: int | None, numerics: "Numerics") -> dict[str, dict[str, Result]]:
    """Answer and score what is not finished, one model folder after the other.

    Returns:
        The results that have a score, by the model's name and the benchmark.
    """
    found: dict[str, dict[str, Result]] = {}
    for _, group in groupby(runs, lambda run: run.model.folder):
        own = list(group)
        for run, outcome in zip(own, evaluate(own, [None] * len(own), processes, numerics, None), strict=True):
            if isinstance(outcome, Score) and outcome.status == "scored":
                found.setdefault(run.name, {})[run.benchmark.name] = Result.load(run.folder)
            else:
                reason = outcome if isinstance(outcome, UserError) else f"is {outcome.status}: {outcome.notes}"
                print_error(f"{run.benchmark.name}, {run.name}: {reason}")
    return found


def common_benchmarks(
    names: Sequence[str], candidates: Sequence[Candidate], found: dict[str, dict[str, Any]]
) -> list[str]:
    """The benchmarks on which every candidate has a score.

    Raises:
        UserError: there is none.
    """
    common = [name for name in names if all(name in found.get(own.name, {}) for own in candidates)]
    if not common:
        raise UserError(
            "no benchmark has a score of every model, so there is nothing to compare; see the errors above."
        )
    if lost := [name for name in names if name not in common]:
        print_text(f"note: {', '.join(lost)}: left out, because not every model has a score there")
    return common


def command(
    candidates: Sequence[Candidate],
    given: Mapping[str, str],
    reductions: Sequence[str],
    names: Sequence[str],
    limit: int | None,
) -> str:
    """The command of a trade-off, with the names of its models."""
    words = ["llava-skip", "tradeoff"]
    for name in dict.fromkeys(own.model.folder.resolve().name for own in candidates):
        words += ["--model", name]
    for option, value in given.items():
        words += [f"--{option}", value] if value else []
    for text in reductions:
        words += ["--reduction", text]
    words += ["--benchmarks", ",".join(names), *(["--limit", str(limit)] if limit else [])]
    return shlex.join(words)


def run(
    model: Annotated[list[Path], typer.Option(help="Saved model, may be repeated; at least one is dense.")],
    methods: Annotated[
        str, typer.Option(help="Rivals on the dense models, with options behind: random,seed=1,grid; or all.")
    ] = "",
    budgets: Annotated[str, typer.Option(help="Tokens of an image for each method, such as 18,12,6.")] = "",
    reduction: Annotated[
        list[str] | None, typer.Option(help="One more METHOD:TOKENS[,NAME=VALUE...], may be repeated.")
    ] = None,
    benchmarks: Annotated[str, typer.Option(help="Names separated by commas: " + ", ".join([*BENCHMARKS, ALL]))] = ALL,
    data: options.DataFiles = None,
    images: options.ImageFolders = None,
    output: Annotated[Path | None, typer.Option(help="Folder of answers, table, figures and page.")] = None,
    processes: options.Processes = None,
    batch_size: options.BatchSize = 32,
    max_new_tokens: options.MaxNewTokens = None,
    limit: options.Limit = None,
    dtype: options.Dtype = None,
    attn: options.Attention = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Tokens of text beside the image, for FLOPs.")] = 30,
    page: Annotated[Path | None, typer.Option(help="Also write the table and figures as this Markdown page.")] = None,
) -> None:
    """Draw score against FLOPs and against measured time; the same command again continues where it ended."""
    output = output or Path(shown(results() / "tradeoff"))
    names = chosen_benchmarks(benchmarks, data or [])
    plan = plan_candidates(model, methods, budgets, reduction or [])
    for text in plan.left_out:
        print_text(f"note: left out: {text}")
    sizes = output, batch_size, max_new_tokens, limit
    runs = plan_runs(
        names, lambda: [own.model for own in plan.candidates], data or [], images or [], *sizes, False, [], []
    )
    from eval.answering.generate import numerics  # slow to import, so only after all checks

    chosen = numerics(dtype, attn)
    found = evaluate_all(runs, processes, chosen)
    common = common_benchmarks(names, plan.candidates, found)
    scored = {name: {benchmark: own[benchmark] for benchmark in common} for name, own in found.items()}
    rows = [make_row(own, scored[own.name], scored[own.dense.name], text_tokens) for own in plan.candidates]
    facts = {
        "command": command(plan.candidates, {"methods": methods, "budgets": budgets}, reduction or [], names, limit),
        "text_tokens": text_tokens,
        "batch_size": batch_size,
        "limit": limit,
        "dtype": chosen.dtype,
        "left_out": plan.left_out,
        "versions": versions("torch", "transformers", "llava_skip"),
    }
    tradeoff = {**facts, "rows": rows, "against": against(plan.candidates, rows, scored)}
    with writing(output):
        write_tradeoff(tradeoff, output)
    if page:
        with writing(page):
            write_page(tradeoff, page)
    output_console().print(short_table(tradeoff))
    print_next(f"open {output / 'index.html'}; all numbers are in {output / 'tradeoff.json'}")


app = make_app(run)


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
