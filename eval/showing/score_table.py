"""Result files and the closing table of a run."""

import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from eval.benchmark import Score


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step, so that a reader or a kill never meets half of it.

    Args:
        path: the file; its folder is made.
        value: what to write.
    """
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON-lines file in one step.

    Args:
        path: the file.
        records: one a line.
    """
    write_whole(path, json_lines(records))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one step; what a kill leaves over, the next attempt replaces.

    Args:
        path: the file; its folder is made.
        content: all of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_bytes(content)
    os.replace(partial, path)


def json_lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Encode records as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package.

    Args:
        packages: import names; a package that runs from its source folder tells its own version.
    """
    found = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = getattr(sys.modules.get(name), "__version__", "not installed")
    return found


def score_table(title: str, score: "Score") -> Table:
    """Lay out the values of a score for the terminal.

    Args:
        title: heading of the table.
        score: what to show.
    """
    table = Table(title=title)
    table.add_column("part")
    table.add_column("value", justify="right")
    for name, value in _flat(score.scores):
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    headline = "-" if score.score is None else f"{score.score:.1f}"
    table.add_section()
    table.add_row(f"score, {score.rule}", headline, style="bold")
    return table


def _flat(scores: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} / ")
        else:
            yield f"{prefix}{name}", value
