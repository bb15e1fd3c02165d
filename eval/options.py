"""What the commands share: options, messages and exit codes."""

import os
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from eval.benchmark import Score
from eval.scoring.judge import Judge
from llava_skip.exits import NOT_SCORED
from llava_skip.exits import USER_ERROR as USAGE_ERROR

JudgeUrl = Annotated[str | None, typer.Option(help="OpenAI-compatible base URL; OPENAI_BASE_URL by default.")]
JudgeModel = Annotated[str, typer.Option(help="Model that grades.")]
JudgeRuns = Annotated[int, typer.Option(help="How often each answer is graded.")]
JudgeConcurrency = Annotated[int, typer.Option(help="Requests to the judge under way at once.")]
JudgeTimeout = Annotated[float, typer.Option(help="Seconds for one reply of the judge.")]
JudgeBudget = Annotated[int | None, typer.Option(help="Most requests to the judge, repeated ones included.")]
JudgeDryRun = Annotated[bool, typer.Option("--judge-dry-run", help="Print what would be asked; send nothing.")]


def make_judge(url: str | None, model: str, runs: int, folder: Path, label: str, **options: Any) -> Judge | None:
    """Make the judge at ``url`` or ``OPENAI_BASE_URL``, or none without either.

    Args:
        url: base URL, if given.
        model: the judge's name there.
        runs: how often each answer is graded.
        folder: where grades are kept.
        label: name of what is graded, which begins the name of the grade file.
        options: further fields of the judge.
    """
    url = url or os.environ.get("OPENAI_BASE_URL")
    return Judge(url, folder, label, model, runs, **options) if url else None


def fail(error: Exception) -> NoReturn:
    """Print an error as one message, without a traceback, and exit."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {error}", markup=False)
    raise typer.Exit(USAGE_ERROR)


def conclude(score: Score, path: Path, console: Console, success: tuple[str, ...]) -> NoReturn:
    """Print the notes and the path of the result, and exit.

    Args:
        score: the outcome.
        path: the result file.
        console: where to print.
        success: the statuses with which the command has done its work.
    """
    for note in score.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(f"{score.status}; written to {path}", markup=False, soft_wrap=True)
    raise typer.Exit(0 if score.status in success else NOT_SCORED)
