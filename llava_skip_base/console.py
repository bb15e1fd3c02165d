"""What the programs print: tables, the message of a user's mistake, figures as files.

Names, ids and answers come from files of others. They are shown as they are written: nothing in them is markup, and
characters that a terminal would obey are shown as their codes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llava_skip_base.errors import UserError
from llava_skip_base.exits import USER_ERROR
from llava_skip_base.texts import plain, shortened

FILE_WIDTH = 160
"""Columns of a table whose output is no terminal; rich would cut it at 80."""

LONGEST_LABEL = 60
"""Characters of a chart's label."""


def chart_label(value: Any) -> str:
    """A value as the label of a chart: no formula, no hidden entry of a legend, and not too long."""
    text = plain(shortened(value, LONGEST_LABEL)).replace("$", r"\$")
    return f"\u200a{text}" if text.startswith("_") else text


def print_text(value: Any) -> None:
    """Print a value as plain text."""
    print(plain(value))


def print_piece(value: Any) -> None:
    """Print the next piece of a text that grows, at once."""
    sys.stdout.write(plain(value))
    sys.stdout.flush()


def print_aside(value: Any) -> None:
    """Print a line about what goes on, paler than the text around it where the terminal can."""
    output_console().print(Text(plain(value), style="dim"), soft_wrap=True)


@contextmanager
def waiting(what: str) -> Iterator[Callable[[], None]]:
    """Show in a terminal that something goes on, until the block ends or what it yields is called."""
    status = output_console().status(Text(plain(what)))
    if sys.stdout.isatty():
        status.start()
    try:
        yield status.stop
    finally:
        status.stop()


def output_console() -> Console:
    """The console of standard output; wide where the output is no terminal."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH, markup=False, emoji=False, highlight=False)


class PlainTable(Table):
    """A table whose cells are shown as they are written."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row; each cell is shown by `plain`, but a `Text` as it is."""
        super().add_row(*(cell if isinstance(cell, Text) else Text(plain(cell)) for cell in cells), **options)


def make_table(title: str | None, headings: Sequence[str], rows: Iterable[Sequence[Any]], right: int = 0) -> PlainTable:
    """A table for the terminal.

    Args:
        title: above the table.
        headings: of the columns; columns of names and values need none ("", "").
        rows: the cells.
        right: the last `right` columns are aligned to the right.
    """
    shown = None if title is None else Text(plain(title), style="table.title")
    table = PlainTable(title=shown, show_header=any(headings), title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(Text(plain(heading)), justify="right" if number >= len(headings) - right else "left")
    for row in rows:
        table.add_row(*row)
    return table


def print_next(text: str) -> None:
    """The last line of a program: what a user would do next."""
    print_text(f"next: {text}")


def print_error(message: Any) -> None:
    """Print `error: message` to standard error."""
    sys.stderr.write(f"error: {plain(message)}\n")
    sys.stderr.flush()


def fail(message: Any) -> NoReturn:
    """Print the message of a user's mistake and exit with its code."""
    print_error(message)
    raise SystemExit(USER_ERROR)


def hide_bars_in_files() -> None:
    """Turn the progress bars of transformers off unless standard error is a terminal: they would fill a log file."""
    if not sys.stderr.isatty():
        from transformers.utils import logging  # slow to import, and most programs need none of it

        logging.disable_progress_bar()


@contextmanager
def one_message() -> Iterator[None]:
    """Around a program: a `UserError` is printed as one message, with exit code 2. Nothing else is caught."""
    try:
        yield
    except UserError as error:
        fail(error)


def make_app(*functions: Callable[..., Any]) -> typer.Typer:
    """Typer functions as a command line; if there are several, the name of each is its first word.

    A user's mistake is one message, `--long-option` and `--long_option` are the same, and `~` in paths is expanded.
    """
    options = {"token_normalize_func": lambda name: name.replace("_", "-")}
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, context_settings=options
    )
    for function in functions:
        app.command()(_command(function))
    return app


def _command(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(**arguments: Any) -> Any:
        with one_message():
            return function(**{name: _expanded(value) for name, value in arguments.items()})

    return run


def _expanded(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_expanded, value))
    return _usable(value.expanduser()) if isinstance(value, Path) else value


def _usable(path: Path) -> Path:
    """A path of the command line, which need not exist.

    Raises:
        UserError: the system cannot look it up, for example because it is too long.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"{shortened(path)}: cannot be looked up ({error.strerror}); check the path.") from error
    return path


def program(function: Callable[..., Any]) -> None:
    """Run a typer function as the program of this process."""
    run_app(make_app(function))


def run_app(app: typer.Typer) -> None:
    """Run a command line as the program of this process; `llava-skip NAME` is its name where that started it."""
    name = sys.argv[0]
    app(prog_name=name if name.startswith("llava-skip ") else None)


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
