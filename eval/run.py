"""Evaluate saved models on benchmarks: ``python -m eval.run --model DIR --benchmarks mmbench,mmstar``."""

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from tqdm import tqdm

from eval import options
from eval.answering.answers import AnswerLog
from eval.answering.costs import CostLog
from eval.answering.engines import check_engine, engine_numerics
from eval.answering.plan import ALL, Run, checked_models, chosen_benchmarks, plan_runs
from eval.answering.workers import answer_jobs
from eval.benchmarks import BENCHMARKS
from eval.overview import FOLDER, print_overview, write_overview
from eval.reading.images import image_keys
from eval.sample import Score
from eval.scoring.judge import DEFAULT_JUDGE, Judge
from eval.showing.results import IMAGES, Result
from eval.showing.score_table import score_table
from eval.study.statistics.scored import score_interval
from llava_skip_base.console import make_app, output_console, print_error, print_next, print_text, run_app
from llava_skip_base.errors import UserError
from llava_skip_base.exits import NOT_SCORED, USER_ERROR
from llava_skip_base.files import read_json, write_json, write_text, writing
from llava_skip_base.paths import results, shown
from llava_skip_base.texts import plain

if TYPE_CHECKING:
    from eval.answering.generate import Numerics


def answer_all(
    runs: Sequence[Run],
    logs: Sequence[AnswerLog],
    costs: Sequence[CostLog],
    processes: int,
    numerics: "Numerics",
    finished: Callable[[int], None],
) -> None:
    """Answer what the logs do not hold yet, all runs from one queue, so that no process waits while there is work.

    `finished` is called with the number of each run whose answers are complete.
    """
    jobs = [run.jobs(number, log) for number, (run, log) in enumerate(zip(runs, logs, strict=True))]
    left = [len(own) for own in jobs]
    total = sum(len(run.samples) for run in runs)
    done = sum(sample.id in log.answers for run, log in zip(runs, logs, strict=True) for sample in run.samples)
    with tqdm(total=total, initial=done, unit="question", disable=(done == total) or None) as progress:
        for number in (number for number, count in enumerate(left) if not count):
            finished(number)
        for job, answered in answer_jobs([job for own in jobs for job in own], processes, numerics):
            run, log = runs[job.run], logs[job.run]
            answers = run.new_answers(job, answered.texts, log)
            log.append(answers)
            if answered.cost is not None:
                costs[job.run].append(answered.cost)
            progress.set_description(plain(f"{run.benchmark.name}: {run.name}"), refresh=False)
            progress.update(len(answers))
            left[job.run] -= 1
            if not left[job.run]:
                finished(job.run)


def score_run(run: Run, log: AnswerLog, costs: CostLog, judge: Judge | None, numerics: "Numerics") -> Score:
    """Score a run whose answers are complete, and write its files."""
    log.sort(sample.id for sample in run.samples)
    answers = {sample.id: log.answers[sample.id]["prediction"] for sample in run.samples}
    with writing(run.folder):
        write_json(run.folder / "predictions.json", {str(id_): text for id_, text in answers.items()})
        score = run.benchmark.score(run.samples, answers, judge)
        write_json(run.folder / "per_sample.json", {str(id_): value for id_, value in score.per_sample.items()})
        write_json(run.folder / "results.json", run.result(score, numerics, costs))
        images = run.folder / IMAGES
        known = read_json(images) if images.is_file() else {}  # the folder holds the answers to one file
        if any(str(sample.id) not in known for sample in run.samples if sample.images):
            write_json(images, image_keys(run.samples))
        for name, text in run.benchmark.reports(score, run.name).items():
            write_text(run.folder / name, text)
    return score


def evaluate(
    runs: Sequence[Run],
    judges: Sequence[Judge | None],
    processes: int | None,
    numerics: "Numerics",
    console: Console | None,
) -> list[Score | UserError]:
    """Answer and score; a run that cannot be scored does not stop the others. The outcome of each run.

    `processes` is None for one for each GPU, or one without a GPU; without `console` no scores are printed.
    """
    import torch

    processes = processes or max(1, torch.cuda.device_count())
    outcomes: dict[int, Score | UserError] = {}
    start = time.monotonic()
    with ExitStack() as stack:
        logs = [stack.enter_context(AnswerLog(run.folder, run.identity(numerics))) for run in runs]
        costs = [CostLog(run.folder, keep=bool(log.answers)) for run, log in zip(runs, logs, strict=True)]
        before = [sum(sample.id in log.answers for sample in run.samples) for run, log in zip(runs, logs, strict=True)]
        if any(before):
            print_text(f"{sum(before)} of {sum(len(run.samples) for run in runs)} answers were there already.")

        def finish(number: int) -> None:
            run = runs[number]
            facts = {"processes": processes, "resumed": before[number], "host": platform.node()}
            try:
                score = outcomes[number] = score_run(run, logs[number], costs[number], judges[number], numerics)
                seconds = round(time.monotonic() - start, 1)
                with writing(run.folder):
                    write_json(run.folder / "run_info.json", {**facts, "seconds_since_start": seconds})
            except UserError as error:
                outcomes[number] = error
                return
            if console:
                has_values = score.status == "scored" and score.per_sample
                found = score_interval(Result.load(run.folder)) if has_values else None
                console.print(score_table(f"{run.benchmark.name}: {run.name}", score, found))

        answer_all(runs, logs, costs, processes, numerics, finish)
    return [outcomes[number] for number in range(len(runs))]


def conclude(runs: Sequence[Run], outcomes: Sequence[Score | UserError]) -> int:
    """Print what a reader must know about each score, and the path of its result.

    Returns:
        The exit code. Answers without a judge or gold are a finished run: they can be scored elsewhere.
    """
    code = 0
    for run, outcome in zip(runs, outcomes, strict=True):
        name = f"{run.benchmark.name}, {run.name}: "
        if isinstance(outcome, UserError):
            print_error(f"{name}{outcome}")
            code = USER_ERROR
            continue
        options.print_outcome(name, outcome, run.folder / "results.json")
        if outcome.status == "incomplete":
            code = code or NOT_SCORED
    return code


def show_all(runs: Sequence[Run], outcomes: Sequence[Score | UserError], folder: Path, console: Console) -> None:
    """Write the overview of the runs that were scored, if there are any, and print its table."""
    finished = [run.folder for run, outcome in zip(runs, outcomes, strict=True) if isinstance(outcome, Score)]
    if not finished:
        return
    with writing(folder):
        overview = write_overview([Result.load(place) for place in finished], folder)
    print_overview(overview, folder, console)
    print_next(f"open {folder / 'index.html'}; llava-skip compare says whether two models differ by more than noise")


def run(
    model: Annotated[
        list[Path] | None, typer.Option(help="Saved model, may be repeated; the newest one by default.")
    ] = None,
    benchmarks: Annotated[str, typer.Option(help="Names separated by commas: " + ", ".join([*BENCHMARKS, ALL]))] = ALL,
    data: options.DataFiles = None,
    images: options.ImageFolders = None,
    output: Annotated[Path | None, typer.Option(help="Results go to OUTPUT/BENCHMARK/MODEL.")] = None,
    processes: options.Processes = None,
    batch_size: options.BatchSize = 32,
    max_new_tokens: options.MaxNewTokens = None,
    limit: options.Limit = None,
    dtype: options.Dtype = None,
    attn: options.Attention = None,
    engine: options.Engine = "transformers",
    reduction: Annotated[
        list[str] | None, typer.Option(help="Rival METHOD:TOKENS[,NAME=VALUE...]; results go to MODEL@METHOD-TOKENS.")
    ] = None,
    blind: Annotated[bool, typer.Option("--blind", help="Ask without images; results go to MODEL-blind.")] = False,
    protocol: Annotated[list[str] | None, typer.Option(help="How to ask: NAME, or BENCHMARK=NAME for each.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="How to score: NAME, or BENCHMARK=NAME for each.")] = None,
    judge_url: options.JudgeUrl = None,
    judge_model: options.JudgeModel = DEFAULT_JUDGE,
    judge_prompt: options.JudgePrompt = None,
    judge_runs: options.JudgeRuns = 1,
    judge_concurrency: options.JudgeConcurrency = 4,
    judge_timeout: options.JudgeTimeout = 60.0,
    judge_budget: options.JudgeBudget = None,
    judge_dry_run: options.JudgeDryRun = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check benchmarks, data and models; answer nothing.")
    ] = False,
) -> None:
    """Answer benchmarks with saved models and score them; the same command again continues an interrupted run."""
    console = output_console()
    limits: dict[str, Any] = {"concurrency": judge_concurrency, "timeout": judge_timeout}
    limits |= {"budget": judge_budget, "dry_run": judge_dry_run}
    names = chosen_benchmarks(benchmarks, data or [])
    sizes = (output := output or Path(shown(results()))), batch_size, max_new_tokens, limit
    processes = check_engine(engine, attn, processes)
    models = partial(checked_models, model or [], reduction or [], needed=not dry_run)
    runs = plan_runs(names, models, data or [], images or [], *sizes, blind, rule or [], protocol or [])
    if dry_run:
        print_text(f"{', '.join(names)}: nothing is wrong with the benchmarks{' and models' if model else ''}")
        return
    texts = options.read_judge_prompt(judge_prompt, [run.benchmark for run in runs if run.model is runs[0].model])
    common = judge_url, judge_model, judge_runs
    judges = [
        options.make_judge(*common, run.folder, run.name, prompt=texts.get(run.benchmark.name), **limits)
        for run in runs
    ]
    outcomes = evaluate(runs, judges, processes, engine_numerics(engine, dtype, attn), console)
    code = conclude(runs, outcomes)
    show_all(runs, outcomes, output / FOLDER, console)
    raise typer.Exit(code)


app = make_app(run)


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
