"""Score a saved prediction file: ``python -m eval.score mmstar --predictions FILE [--data FILE] --json OUT``.

Needs neither torch nor a model. Reads what LLaVA, VLMEvalKit, lmms-eval, the Skip-Vision code and ``eval.run`` write.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from eval import options
from eval.benchmark import Benchmark, match
from eval.benchmarks import BENCHMARKS, get_benchmark
from eval.benchmarks.mmstar import MMStar, gain_and_leakage
from eval.reading.lmms_logs import answers_by_number, plain_rows
from eval.reading.tables import Row, sha256
from eval.sample import Sample, Score
from eval.scoring.judge import DEFAULT_JUDGE, Judge
from eval.showing.score_table import score_table
from eval.versions import versions
from llava_skip_base.console import make_app, output_console, print_next, run_app
from llava_skip_base.errors import UserError
from llava_skip_base.exits import NOT_SCORED
from llava_skip_base.files import read_json, write_json, write_text, writing


def score_file(
    benchmark: Benchmark,
    predictions: Path,
    data: Path | None,
    allow_missing: bool,
    judge: Judge | None,
    submission: Path | None = None,
) -> Score:
    """Score the predictions in a file, or the grades in MM-Vet's grade file.

    The benchmark file `data` is not needed if `predictions` repeats its columns. `submission` is written for the
    benchmark's server.

    Raises:
        UserError: if the files do not fit together.
    """
    rows = plain_rows(benchmark.read_predictions(predictions))
    benchmark.check_texts(rows, str(predictions))
    samples = benchmark.load(data, with_images=False) if data else own_samples(benchmark, rows, predictions)
    graded = benchmark.score_graded(samples, rows)
    if graded is not None:
        if submission:
            raise UserError(f"{predictions}: holds grades, of which no submission can be made; give the answers.")
        return graded
    numbered = answers_by_number(rows, samples) if data else None
    found = numbered or benchmark.predictions(rows, str(predictions), samples)
    answers, counts, notes = match(samples, found, allow_missing)
    if not data:
        notes.append("no --data was given: rows that the prediction file lacks altogether can go unnoticed.")
    if submission:
        with writing(submission):
            notes += benchmark.write_submission(samples, answers, submission)
    score = benchmark.score(samples, answers, judge)
    score.counts.update(counts)
    score.notes[:0] = notes
    return score


def own_samples(benchmark: Benchmark, rows: Sequence[Row], source: Path) -> list[Sample]:
    """Take the questions from a prediction file that repeats them, after checking what can be checked.

    Raises:
        UserError: if columns or rows are lacking.
    """
    found = {name for row in rows for name in row}
    if found & {*benchmark.answer_columns} == {"answer"} and not found & {"label", "answers", "references"}:
        raise UserError(
            f"{source}: its column answer holds either gold answers or the model's, not both; name the model's "
            "prediction, or give the benchmark file with --data."
        )
    rows = benchmark.normalise(list(rows))
    benchmark.check_columns(rows, str(source))
    samples = benchmark.samples(rows)
    benchmark.check_whole(samples, str(source))
    return samples


def headline(benchmark: Benchmark, source: Path, data: Path | None, allow_missing: bool) -> float:
    """Read a score from a result file of this command or of ``eval.run``, or make it from predictions.

    Raises:
        UserError: if the result is of another benchmark or rule, or holds no score.
    """
    try:
        result = read_json(source) if source.suffix == ".json" else None
    except UserError:
        result = None
    if not isinstance(result, dict) or "rule" not in result:
        result = asdict(score_file(benchmark, source, data, allow_missing, None))
    if result["rule"] != benchmark.rule or result["score"] is None:
        raise UserError(f"{source}: holds {result['score']} by the rule {result['rule']}; needed {benchmark.rule}.")
    return result["score"]


def run(
    benchmark: Annotated[str, typer.Argument(help=", ".join(BENCHMARKS))],
    predictions: Annotated[Path, typer.Option(help="Predictions (xlsx, tsv, csv, jsonl, json), or grades of MM-Vet.")],
    output: Annotated[Path, typer.Option("--json", help="Where to write the scores.")],
    data: Annotated[Path | None, typer.Option(help="Benchmark file, where the predictions do not repeat it.")] = None,
    rule: Annotated[str | None, typer.Option(help="How to score; the benchmark's official rule by default.")] = None,
    allow_missing: Annotated[bool, typer.Option(help="Count absent predictions as wrong; else refuse them.")] = False,
    submission: Annotated[Path | None, typer.Option(help="Also write what the benchmark's server takes.")] = None,
    without_image: Annotated[
        Path | None, typer.Option(help="MMStar: result or predictions of the same model without images.")
    ] = None,
    language_model: Annotated[
        Path | None, typer.Option(help="MMStar: result or predictions of the language model it was built on.")
    ] = None,
    judge_url: options.JudgeUrl = None,
    judge_model: options.JudgeModel = DEFAULT_JUDGE,
    judge_prompt: options.JudgePrompt = None,
    judge_runs: options.JudgeRuns = 1,
    judge_concurrency: options.JudgeConcurrency = 4,
    judge_timeout: options.JudgeTimeout = 60.0,
    judge_budget: options.JudgeBudget = None,
    judge_dry_run: options.JudgeDryRun = False,
) -> None:
    """Score a saved prediction file."""
    if output.is_dir():
        raise UserError(f"{output}: is a folder; give --json the name of a file to write.")
    limits: dict[str, Any] = {"concurrency": judge_concurrency, "timeout": judge_timeout, "budget": judge_budget}
    chosen = get_benchmark(benchmark, rule)
    limits["dry_run"] = judge_dry_run
    limits["prompt"] = options.read_judge_prompt(judge_prompt, [chosen]).get(chosen.name)
    judge = options.make_judge(judge_url, judge_model, judge_runs, output.parent, predictions.stem, **limits)
    score = score_file(chosen, predictions, data, allow_missing, judge, submission)
    if without_image or language_model:
        add_gain(chosen, score, without_image, language_model, data, allow_missing)
    files = {"predictions": predictions, "data": data, "without_image": without_image, "language_model": language_model}
    described = {name: {"path": str(path), "sha256": sha256([path])} for name, path in files.items() if path}
    with writing(output):
        write_json(output, {"benchmark": chosen.name, **asdict(score), **described, "versions": versions("llava_skip")})
        for name, text in chosen.reports(score, predictions.stem).items():
            write_text(output.with_name(name), text)
    output_console().print(score_table(f"{chosen.name}: {predictions.name}", score))
    options.print_outcome("", score, output)
    again = "give what the notes ask for, and run it again"
    print_next("llava-skip eval shows every question of a model" if score.status == "scored" else again)
    raise typer.Exit(0 if score.status == "scored" else NOT_SCORED)


def add_gain(
    benchmark: Benchmark,
    score: Score,
    without_image: Path | None,
    language_model: Path | None,
    data: Path | None,
    allow_missing: bool,
) -> None:
    """Add MMStar's multi-modal gain and leakage to `score`, the score of the model with images.

    Raises:
        UserError: for another benchmark, or if one of the two files is missing.
    """
    if not isinstance(benchmark, MMStar) or without_image is None or language_model is None or score.score is None:
        raise UserError("gain and leakage are MMStar's: give --without-image and --language-model together.")
    others = (headline(benchmark, path, data, allow_missing) for path in (without_image, language_model))
    score.scores["gain and leakage"] = gain_and_leakage(score.score, *others)


app = make_app(run)


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
