"""What the programs print: tables, the message of a user's mistake, figures as files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from llava_skip_base.errors import UserError
from llava_skip_base.exits import USER_ERROR

FILE_WIDTH = 160
"""Columns of a table whose output is no terminal; rich would cut it at 80."""


def output_console() -> Console:
    """The console of standard output; wide where the output is no terminal."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH)


def make_table(title: str | None, headings: Sequence[str], rows: Iterable[Sequence[Any]], right: int = 0) -> Table:
    """A table for the terminal.

    Args:
        title: above the table.
        headings: of the columns; columns of names and values need none ("", "").
        rows: the cells, shown by `str`.
        right: the last `right` columns are aligned to the right.
    """
    table = Table(title=title, show_header=any(headings), title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number >= len(headings) - right else "left")
    for row in rows:
        table.add_row(*map(str, row))
    return table


def print_error(message: Any) -> None:
    """Print `error: message` to standard error."""
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()


def fail(message: Any) -> NoReturn:
    """Print the message of a user's mistake and exit with its code."""
    print_error(message)
    raise SystemExit(USER_ERROR)


@contextmanager
def one_message() -> Iterator[None]:
    """Around a program: a `UserError` is printed as one message, with exit code 2. Nothing else is caught."""
    try:
        yield
    except UserError as error:
        fail(error)


def make_app(function: Callable[..., Any]) -> typer.Typer:
    """A typer function as a command line: one message for a user's mistake, `--long-option` and `--long_option`."""
    options = {"token_normalize_func": lambda name: name.replace("_", "-")}
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, context_settings=options
    )
    app.command()(one_message()(function))
    return app


def program(function: Callable[..., Any]) -> None:
    """Run a typer function as the program of this process."""
    make_app(function)()


@contextmanager
def figure(path: Path, size: tuple[float, float] = (7, 4), **options: Any) -> Iterator[Any]:
    """A matplotlib figure that is saved as a PNG, the same bytes for the same drawing; yields its axes.

    Args:
        path: the file; its folder is made.
        size: width and height in inches.
        **options: of `matplotlib.pyplot.subplots`.
    """
    import matplotlib  # takes a second, and is in the extras of the programs that draw

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(figsize=size, layout="constrained", **options)
    try:
        yield axes
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path, dpi=120, metadata={"Software": None})
    finally:
        plt.close(drawing)
