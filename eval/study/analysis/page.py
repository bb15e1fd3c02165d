"""The page of an analysis, and its tables as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.showing.pages import template
from llava_skip_base.files import write_bytes, write_text
from llava_skip_base.plain_markdown import markdown_table, markdown_text

Table = tuple[list[str], list[list[str]]]
"""Headings and rows."""


@dataclass(frozen=True)
class Section:
    """A part of the analysis, as the page shows it.

    Attributes:
        name: of the part.
        title: above it.
        definitions: of what is shown, by name.
        charts: names of PNGs in the page's folder.
        table: headings and rows.
        notes: sentences below it.
    """

    name: str
    title: str
    definitions: Mapping[str, str]
    charts: Sequence[str]
    table: Table
    notes: Sequence[str] = ()


def write_page(
    folder: Path,
    title: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    samples: Sequence[Mapping[str, Any]],
    agreement: str,
) -> None:
    """Write ``index.html``: one page without scripts of its own that needs the files of its folder alone.

    Args:
        folder: of the page; the charts and pictures are there.
        title: the model's name.
        facts: what was analysed, name and value.
        sections: the parts.
        samples: questions with answers and pictures.
        agreement: how often two models gave one answer; "" for one model.
    """
    text = template("analysis.html.jinja").render(
        title=title, facts=facts, parts=sections, samples=samples, agreement=agreement
    )
    write_bytes(folder / "index.html", text.encode("utf-8", "replace"))


def write_tables(folder: Path, title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> None:
    """Write ``tables.md``: the tables with their definitions and charts, as Markdown to be put into a document."""
    lines = [f"# {markdown_text(title)}", "", *markdown_table([["", ""], *map(list, facts)]), ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        lines += markdown_table([["", "definition"], *([name, text] for name, text in section.definitions.items())])
        lines += ["", *(f"![{name.removesuffix('.png')}]({name})" for name in section.charts), ""]
        lines += [*markdown_table([section.table[0], *section.table[1]]), ""]
        lines += [*(f"- {markdown_text(note)}" for note in section.notes), ""]
    write_text(folder / "tables.md", "\n".join(lines))
