"""What the programs share: how models answer, the judge's options, and the last lines of their output."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from eval.benchmark import Benchmark
from eval.sample import Score
from eval.scoring.judge import Judge
from llava_skip_base.console import print_text
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_text

DataFiles = Annotated[list[str] | None, typer.Option(help="FILE, or NAME=FILE for each; default: embedded.")]
ImageFolders = Annotated[list[str] | None, typer.Option(help="Folder of image files, or NAME=FOLDER each.")]
Processes = Annotated[int | None, typer.Option(min=1, help="Processes; one for each GPU by default.")]
BatchSize = Annotated[int, typer.Option(help="Questions answered at once.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Longest answer; the protocol's by default.")]
Limit = Annotated[int | None, typer.Option(help="Only the first N questions of each benchmark.")]
Dtype = Annotated[str | None, typer.Option(help="Number format; bfloat16 on GPUs, else float32.")]
Attention = Annotated[str | None, typer.Option(help="Attention: sdpa, eager, flash_attention_2, ...")]
Engine = Annotated[str, typer.Option(help="What answers: transformers, or vllm in its own environment.")]

JudgeUrl = Annotated[str | None, typer.Option(help="OpenAI-compatible base URL; OPENAI_BASE_URL by default.")]
JudgeModel = Annotated[str, typer.Option(help="Model that grades.")]
JudgePrompt = Annotated[
    Path | None, typer.Option(help="File with the official text for the judge (MM-Vet, MathVista).")
]
JudgeRuns = Annotated[int, typer.Option(help="How often each answer is graded.")]
JudgeConcurrency = Annotated[int, typer.Option(help="Requests to the judge at the same time.")]
JudgeTimeout = Annotated[float, typer.Option(help="Seconds for one reply of the judge.")]
JudgeBudget = Annotated[int | None, typer.Option(help="Most requests to the judge, repeated ones included.")]
JudgeDryRun = Annotated[bool, typer.Option("--judge-dry-run", help="Print what would be asked; send nothing.")]


def make_judge(url: str | None, model: str, runs: int, folder: Path, label: str, **options: Any) -> Judge | None:
    """The judge at `url` or `OPENAI_BASE_URL`, or None without either; `options` are further fields of `Judge`."""
    url = url or os.environ.get("OPENAI_BASE_URL")
    if not url and options.get("prompt"):
        raise UserError("--judge-prompt is given and no judge: give --judge-url (or OPENAI_BASE_URL) as well.")
    return Judge(url, folder, label, model, runs, **options) if url else None


def read_judge_prompt(path: Path | None, benchmarks: Sequence[Benchmark]) -> dict[str, str]:
    """The text of `--judge-prompt`, by the name of the benchmark that takes it.

    Raises:
        UserError: none of the benchmarks takes one, or several do, whose texts differ.
    """
    takers = [benchmark.name for benchmark in benchmarks if benchmark.takes_judge_prompt]
    if path is None:
        return {}
    if len(takers) != 1:
        raise UserError(
            f"--judge-prompt is the official text of one benchmark, and {len(takers)} of those chosen take one "
            "(mmvet and mathvista do); evaluate it by itself."
        )
    text = read_text(path)
    if not text.strip():
        raise UserError(f"--judge-prompt {path}: is empty; give the benchmark's official text.")
    return {takers[0]: text}


def print_outcome(name: str, score: Score, path: Path) -> None:
    """Print what a reader must know about a number, and the path of its result; `name` is put before each note."""
    for note in score.notes:
        print_text(f"note: {name}{note}")
    print_text(f"{score.status}; written to {path}")
