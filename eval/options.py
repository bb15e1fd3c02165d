"""What the programs share: the judge's options, and the end of a program."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from eval.sample import Score
from eval.scoring.judge import Judge

JudgeUrl = Annotated[str | None, typer.Option(help="OpenAI-compatible base URL; OPENAI_BASE_URL by default.")]
JudgeModel = Annotated[str, typer.Option(help="Model that grades.")]
JudgeRuns = Annotated[int, typer.Option(help="How often each answer is graded.")]
JudgeConcurrency = Annotated[int, typer.Option(help="Requests to the judge under way at once.")]
JudgeTimeout = Annotated[float, typer.Option(help="Seconds for one reply of the judge.")]
JudgeBudget = Annotated[int | None, typer.Option(help="Most requests to the judge, repeated ones included.")]
JudgeDryRun = Annotated[bool, typer.Option("--judge-dry-run", help="Print what would be asked; send nothing.")]


def make_judge(url: str | None, model: str, runs: int, folder: Path, label: str, **options: Any) -> Judge | None:
    """The judge at `url` or `OPENAI_BASE_URL`, or none without either.

    Args:
        url: base URL, if given.
        model: the judge's name there.
        runs: how often each answer is graded.
        folder: where grades are kept.
        label: name of what is graded, which begins the name of the grade file.
        **options: further fields of the judge.
    """
    url = url or os.environ.get("OPENAI_BASE_URL")
    return Judge(url, folder, label, model, runs, **options) if url else None


def print_outcome(name: str, score: Score, path: Path, console: Console) -> None:
    """Print what a reader must know about a number, and where it is.

    Args:
        name: before each note; may be empty.
        score: the outcome.
        path: the result file.
        console: where to print.
    """
    for note in score.notes:
        console.print(f"note: {name}{note}", markup=False, soft_wrap=True)
    console.print(f"{score.status}; written to {path}", markup=False, soft_wrap=True)
