"""Score a saved prediction file: ``python -m eval.score mmstar --predictions FILE [--data FILE] --json OUT``.

Needs neither torch nor a model. Reads what LLaVA, VLMEvalKit, the Skip-Vision code and ``eval.run`` write.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from eval.benchmarks import get_benchmark
from eval.benchmarks.base import Benchmark, Sample, Score, match
from eval.cli import JudgeModel, JudgeRuns, JudgeUrl, conclude, fail, make_judge
from eval.errors import EvalError
from eval.judge import DEFAULT_JUDGE, Judge
from eval.report import score_table, versions, write_json
from eval.tables import Row, read_rows, sha256

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def score_file(
    benchmark: Benchmark, predictions: Path, data: Path | None, allow_missing: bool, judge: Judge | None
) -> Score:
    """Score the predictions of one file.

    Args:
        benchmark: whose rules to follow.
        predictions: the prediction file, or MM-Vet's grade file.
        data: the benchmark file; not needed where the prediction file repeats its columns.
        allow_missing: count absent predictions as wrong instead of refusing.
        judge: who grades answers that have no grades yet.

    Raises:
        EvalError: if the files do not fit together.
    """
    rows = read_rows(predictions)
    samples = benchmark.load(data, with_images=False) if data else own_samples(benchmark, rows, predictions)
    graded = benchmark.score_graded(samples, rows)
    if graded is not None:
        return graded
    answers, counts, notes = match(samples, benchmark.predictions(rows, str(predictions)), allow_missing)
    if not data:
        notes.append("no --data was given: rows that the prediction file lacks altogether can go unnoticed.")
    score = benchmark.score(samples, answers, judge)
    score.counts.update(counts)
    score.notes[:0] = notes
    return score


def own_samples(benchmark: Benchmark, rows: Sequence[Row], source: Path) -> list[Sample]:
    """Take the questions from a prediction file that repeats them, as far as it shows to be whole.

    Args:
        benchmark: whose columns to look for.
        rows: rows of the prediction file.
        source: the file, for messages.

    Raises:
        EvalError: if columns or rows are lacking.
    """
    benchmark.check_columns(rows, str(source))
    samples = benchmark.samples(rows)
    benchmark.check_whole(samples, str(source))
    return samples


@app.command()
def main(
    benchmark: Annotated[str, typer.Argument(help="mmbench, mmstar or mmvet.")],
    predictions: Annotated[Path, typer.Option(help="Predictions (xlsx, tsv, csv, jsonl, json), or grades of MM-Vet.")],
    json: Annotated[Path, typer.Option(help="Where to write the scores.")],
    data: Annotated[Path | None, typer.Option(help="Benchmark file, where the predictions do not repeat it.")] = None,
    allow_missing: Annotated[bool, typer.Option(help="Count absent predictions as wrong; else refuse them.")] = False,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = DEFAULT_JUDGE,
    judge_runs: JudgeRuns = 1,
) -> None:
    """Score a saved prediction file alone."""
    console = Console()
    try:
        chosen = get_benchmark(benchmark)
        judge = make_judge(judge_url, judge_model, judge_runs, json.parent, predictions.stem)
        score = score_file(chosen, predictions, data, allow_missing, judge)
    except EvalError as error:
        fail(error)
    files = {"predictions": predictions, "data": data}
    described = {name: {"path": str(path), "sha256": sha256([path])} for name, path in files.items() if path}
    write_json(json, {"benchmark": benchmark, **asdict(score), **described, "versions": versions("llava_skip")})
    console.print(score_table(f"{benchmark}: {predictions.name}", score))
    conclude(score, json, console, success=("scored",))


if __name__ == "__main__":
    app()
