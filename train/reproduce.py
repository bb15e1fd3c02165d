"""Writes docs/reproduce.md, the paper's tables as commands, from the recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_skip_base.console import print_text, program
from llava_skip_base.files import write_text
from llava_skip_base.paths import home, shown
from train.planning.page import page


def run(
    output: Annotated[
        Path | None, typer.Option(help="The page to write; default: docs/reproduce.md.", show_default=False)
    ] = None,
) -> None:
    """Write the page of the paper's tables: recipes, commands, expected scores, hours and memory."""
    output = output or home() / "docs" / "reproduce.md"
    write_text(output, page())
    print_text(f"Open {shown(output)}.")


def main() -> None:
    """Run the command line."""
    program(run)


if __name__ == "__main__":
    main()
