"""What the programs share: the judge's options, and the last lines of their output."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from eval.sample import Score
from eval.scoring.judge import Judge
from llava_skip_base.console import print_text

JudgeUrl = Annotated[str | None, typer.Option(help="OpenAI-compatible base URL; OPENAI_BASE_URL by default.")]
JudgeModel = Annotated[str, typer.Option(help="Model that grades.")]
JudgeRuns = Annotated[int, typer.Option(help="How often each answer is graded.")]
JudgeConcurrency = Annotated[int, typer.Option(help="Requests to the judge at the same time.")]
JudgeTimeout = Annotated[float, typer.Option(help="Seconds for one reply of the judge.")]
JudgeBudget = Annotated[int | None, typer.Option(help="Most requests to the judge, repeated ones included.")]
JudgeDryRun = Annotated[bool, typer.Option("--judge-dry-run", help="Print what would be asked; send nothing.")]


def make_judge(url: str | None, model: str, runs: int, folder: Path, label: str, **options: Any) -> Judge | None:
    """The judge at `url` or `OPENAI_BASE_URL`, or None without either; `options` are further fields of `Judge`."""
    url = url or os.environ.get("OPENAI_BASE_URL")
    return Judge(url, folder, label, model, runs, **options) if url else None


def print_outcome(name: str, score: Score, path: Path) -> None:
    """Print what a reader must know about a number, and the path of its result; `name` is put before each note."""
    for note in score.notes:
        print_text(f"note: {name}{note}")
    print_text(f"{score.status}; written to {path}")
