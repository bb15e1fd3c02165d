"""Command line of the conformance run: `python -m tests.conformance [DIR]`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from llava_skip_base.console import make_table, output_console, program
from llava_skip_base.exits import DISAGREES
from llava_skip_base.files import write_json
from tests.conformance import Comparison, GoldenFolder, UnknownKind, check_golden, check_table

GOLDENS = Path(__file__).parents[1] / "goldens"
"""The project's own golden tensors."""


def _row(name: str, check: Callable[[], list[Comparison]]) -> dict:
    try:
        comparisons = check()
    except UnknownKind as error:
        return {"file": name, "passed": False, "unknown": str(error), "comparisons": []}
    except (ValueError, LookupError, RuntimeError, FileNotFoundError) as error:
        return {"file": name, "passed": False, "failed": repr(error), "comparisons": []}
    rows = [{"what": c.what, "error": c.error, "tolerance": c.tolerance, "passed": c.passed} for c in comparisons]
    return {"file": name, "passed": bool(rows) and all(c.passed for c in comparisons), "comparisons": rows}


def _describe(row: dict) -> tuple[str, str, str]:
    if "unknown" in row or "failed" in row:
        result = "unknown" if "unknown" in row else "failed"
        return result, "", row[result]
    # The worst comparison is the one that fills most of its tolerance; a choice that differs overflows it.
    worst = max(row["comparisons"], key=lambda c: (not c["passed"], c["error"] / (c["tolerance"] or 1)))
    text = f"{len(row['comparisons'])} comparisons, worst: {worst['what']}"
    return "ok" if row["passed"] else "FAILED", f"{worst['error']:.1e} of {worst['tolerance']:.0e}", text


def run(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with index.json and safetensors files.")
    ] = GOLDENS,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write every comparison here.")] = None,
) -> None:
    """Compare the library with golden tensors; exit 1 if one is off or of a kind that is not known."""
    torch.set_num_threads(1)
    folder = GoldenFolder(directory)
    rows = [_row(golden.name, partial(check_golden, golden)) for golden in folder.files.values()]
    rows += [_row(name, partial(check_table, table)) for name, table in folder.tables.items()]
    rows += [
        {"file": name, "passed": False, "unknown": "not in index.json, and no check reads it", "comparisons": []}
        for name in folder.unindexed()
    ]
    headings = ("file", "result", "largest error", "compared")
    output_console().print(make_table(None, headings, [(row["file"], *_describe(row)) for row in rows]))
    if json_path:
        write_json(json_path, rows)
    passed = sum(row["passed"] for row in rows)
    typer.echo(f"{passed} of {len(rows)} files agree")
    raise typer.Exit(0 if passed == len(rows) else DISAGREES)


def main() -> None:
    """Run the command line."""
    program(run)


if __name__ == "__main__":
    main()
