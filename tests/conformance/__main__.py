"""Command line of the conformance run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from tests.conformance import Comparison, GoldenFolder, UnknownKind, check_golden, check_table


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
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with index.json and safetensors files.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write every comparison here.")] = None,
) -> None:
    """Compare the library with golden tensors; exit 1 if one is off or of a kind that is not known."""
    torch.set_num_threads(1)
    try:
        folder = GoldenFolder(directory)
    except FileNotFoundError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    rows = [_row(golden.name, partial(check_golden, golden)) for golden in folder.files.values()]
    rows += [_row(name, partial(check_table, table)) for name, table in folder.tables.items()]
    rows += [
        {"file": name, "passed": False, "unknown": "not in index.json, and no check reads it", "comparisons": []}
        for name in folder.unindexed()
    ]
    table = Table("file", "result", "largest error", "compared")
    for row in rows:
        table.add_row(row["file"], *_describe(row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if json_path:
        json_path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    passed = sum(row["passed"] for row in rows)
    typer.echo(f"{passed} of {len(rows)} files agree")
    raise typer.Exit(0 if passed == len(rows) else 1)


if __name__ == "__main__":
    typer.run(run)
