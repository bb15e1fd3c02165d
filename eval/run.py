"""Evaluate a saved model on a benchmark: ``python -m eval.run --model DIR --benchmark mmbench --data FILE``."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from tqdm import tqdm

from eval.answers import AnswerLog
from eval.benchmarks import get_benchmark
from eval.benchmarks.base import Benchmark, Sample, Score
from eval.cli import JudgeModel, JudgeRuns, JudgeUrl, conclude, fail, make_judge
from eval.errors import EvalError
from eval.judge import DEFAULT_JUDGE, Judge
from eval.models import SavedModel, check_model, newest_model
from eval.report import score_table, versions, write_json
from eval.tables import sha256

EMBEDDED = Path("playground/data/digits/eval")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Run:
    """An evaluation whose inputs have all been checked.

    Attributes:
        benchmark: what to ask and how to score.
        model: who answers.
        data: the benchmark file.
        samples: its questions.
        output: folder of the answers and the result.
        batch_size: questions answered at once.
        max_new_tokens: limit of an answer's length.
    """

    benchmark: Benchmark
    model: SavedModel
    data: Path
    samples: list[Sample]
    output: Path
    batch_size: int
    max_new_tokens: int

    @cached_property
    def data_sha256(self) -> str:
        """Hash of the benchmark file."""
        return sha256([self.data])

    def identity(self, dtype: str) -> dict[str, Any]:
        """Say what the answers depend on; only with all of it unchanged may a broken-off run go on."""
        return {
            "benchmark": self.benchmark.name,
            "model": self.model.name,
            "model_sha256": self.model.sha256,
            "data_sha256": self.data_sha256,
            "protocol": self.benchmark.protocol(self.samples),
            "max_new_tokens": self.max_new_tokens,
            "dtype": dtype,
        }


def embedded_data(benchmark: Benchmark) -> Path:
    """Find the benchmark's file in the embedded data set.

    Args:
        benchmark: whose file.

    Raises:
        EvalError: if the data set has not been built.
    """
    path = EMBEDDED / benchmark.embedded
    if not path.is_file():
        raise EvalError(f"no --data given, and {path} does not exist; build it with 'python -m playground.data.build'.")
    return path


def answer_all(run: Run, log: AnswerLog) -> None:
    """Answer what the log does not hold yet.

    Batches are cut from all questions, not from the open ones: after a break each question then meets the same
    neighbours, and so the same rounding, as in a run without one.

    Args:
        run: the evaluation.
        log: where answers go.
    """
    prompts = dict(zip((s.id for s in run.samples), run.benchmark.prompts(run.samples), strict=True))
    ordered = sorted(run.samples, key=lambda s: (len(s.images), len(prompts[s.id])), reverse=True)
    batches = [ordered[start : start + run.batch_size] for start in range(0, len(ordered), run.batch_size)]
    batches = [batch for batch in batches if any(s.id not in log.records for s in batch)]
    if not batches:
        return
    from eval.generate import Generator

    generator = Generator(run.model, run.max_new_tokens)
    done = sum(s.id in log.records for s in ordered)
    with tqdm(total=len(ordered), initial=done, desc=run.benchmark.name, unit="question") as progress:
        for batch in batches:
            texts = generator.answer([prompts[s.id] for s in batch], [s.images for s in batch])
            records = [
                {**s.fields, "index": s.id, "prompt": prompts[s.id], "prediction": text}
                for s, text in zip(batch, texts, strict=True)
                if s.id not in log.records
            ]
            log.append(records)
            progress.update(len(records))


def result(run: Run, score: Score, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Put together everything that a reader of the number needs.

    Args:
        run: the evaluation.
        score: its outcome.
        facts: device, number format and seconds.
    """
    return {
        "benchmark": run.benchmark.name,
        **asdict(score),
        "protocol": run.benchmark.protocol(run.samples),
        "model": run.model.describe(),
        "data": {"path": str(run.data), "sha256": run.data_sha256},
        "generation": {"batch_size": run.batch_size, "max_new_tokens": run.max_new_tokens, "greedy": True, **facts},
        "versions": versions("torch", "transformers", "llava_skip"),
    }


def evaluate(run: Run, judge: Judge | None, console: Console) -> Score:
    """Answer, score, and write ``predictions.json`` (what MM-Vet's grader reads) and ``results.json``.

    Args:
        run: the evaluation.
        judge: who grades, if the benchmark needs it.
        console: where the table goes.
    """
    from eval.generate import placement

    start = time.monotonic()
    device, dtype = placement()
    with AnswerLog(run.output, run.identity(dtype)) as log:
        resumed = sum(s.id in log.records for s in run.samples)
        if resumed:
            console.print(f"{resumed} of {len(run.samples)} answers were there already.")
        answer_all(run, log)
        console.print(f"answers saved in {log.path}", markup=False, soft_wrap=True)
        answers = {s.id: log.records[s.id]["prediction"] for s in run.samples}
    write_json(run.output / "predictions.json", {str(id_): text for id_, text in answers.items()})
    score = run.benchmark.score(run.samples, answers, judge)
    facts = {"device": device, "dtype": dtype, "resumed": resumed, "seconds": round(time.monotonic() - start, 1)}
    write_json(run.output / "results.json", result(run, score, facts))
    console.print(score_table(f"{run.benchmark.name}: {run.model.name}", score))
    return score


def prepare(
    benchmark: Benchmark,
    model: Path | None,
    data: Path | None,
    images: Path | None,
    output: Path | None,
    batch_size: int,
    max_new_tokens: int | None,
    limit: int | None,
) -> Run:
    """Check all inputs, the cheap ones first, before a model is loaded.

    Args:
        benchmark: what to evaluate on.
        model: the model folder, or None for the newest.
        data: the benchmark file, or None for the embedded one.
        images: folder of image files, or None.
        output: results folder, or None for ``results/<benchmark>/<model>``.
        batch_size: questions answered at once.
        max_new_tokens: limit of an answer's length, or None for the protocol's.
        limit: how many questions, or None for all.

    Raises:
        EvalError: on the first thing that is wrong.
    """
    for name, value in {"--batch-size": batch_size, "--max-new-tokens": max_new_tokens, "--limit": limit}.items():
        if value is not None and value < 1:
            raise EvalError(f"{name} is {value}; expected 1 or more.")
    if images is not None and not images.is_dir():
        raise EvalError(f"{images}: no such image folder; check --images.")
    checked = check_model(model or newest_model())
    data = data or embedded_data(benchmark)
    samples = benchmark.load(data, images)
    if limit is not None:
        samples = benchmark.limit(samples, limit)
    output = output or Path("results") / benchmark.name / checked.name
    if output.exists() and not output.is_dir():
        raise EvalError(f"{output}: is a file; give a folder for the results with --output.")
    return Run(benchmark, checked, data, samples, output, batch_size, max_new_tokens or benchmark.max_new_tokens)


@app.command()
def main(
    benchmark: Annotated[str, typer.Option(help="mmbench, mmstar or mmvet.")],
    model: Annotated[Path | None, typer.Option(help="Saved model; the newest under checkpoints/ by default.")] = None,
    data: Annotated[Path | None, typer.Option(help="Benchmark file; the embedded one by default.")] = None,
    images: Annotated[Path | None, typer.Option(help="Image files; images/ beside the data by default.")] = None,
    output: Annotated[Path | None, typer.Option(help="Results folder; results/BENCHMARK/MODEL by default.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered at once.")] = 32,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer; the protocol's by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N questions.")] = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = DEFAULT_JUDGE,
    judge_runs: JudgeRuns = 1,
) -> None:
    """Answer a benchmark with a saved model and score it; run again to go on after a break."""
    console = Console()
    try:
        chosen = get_benchmark(benchmark)
        run = prepare(chosen, model, data, images, output, batch_size, max_new_tokens, limit)
        judge = make_judge(judge_url, judge_model, judge_runs, run.output, run.model.name)
        score = evaluate(run, judge, console)
    except EvalError as error:
        fail(error)
    # Answers without a judge or gold are a finished run: they can be scored elsewhere.
    conclude(score, run.output / "results.json", console, success=("scored", "unscored"))


if __name__ == "__main__":
    app()
