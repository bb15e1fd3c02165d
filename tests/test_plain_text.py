"""Text from data is never markup: what every table, line, chart and message does with it."""

import ast
import io
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from eval.showing.charts import bars, radar
from llava_skip_base.console import (
    chart_label,
    figure,
    make_table,
    one_message,
    output_console,
    print_error,
    print_next,
    print_text,
)
from llava_skip_base.errors import UserError
from llava_skip_base.texts import plain, shortened
from tests.support.hostile import ALL, WORDS, lacking
from train.reporting.result import draw_loss, show_result

ROOT = Path(__file__).parents[1]
PRINTERS = {
    "llava_skip_base.console": {"print"},
    "llava_skip_base.command": {"print"},  # the list of programs, before typer is loaded
    "train.command_line": {"print"},  # the list of arguments
    "train.launch": {"print"},  # words of a command, quoted for a shell
    "train.recipe.plan": {"print"},  # JSON in ASCII
}
"""Modules that call `print` itself, and why."""


def test_tables_show_every_text_as_it_is_written(capsys):
    table = make_table(f"title {WORDS[0]}", (WORDS[1], "value"), [(word, "1") for word in ALL])
    table.add_row(*WORDS[2:4], style="bold")
    output_console().print(table)
    shown = capsys.readouterr().out
    assert lacking(shown) == []
    assert "title [/b]" in shown and shown.count("[/INST]") == 2


def test_lines_and_messages_show_every_text_as_it_is_written(capsys):
    for say in (print_text, print_next, print_error):
        say(" ".join(ALL))
        printed = capsys.readouterr()
        assert lacking(printed.out + printed.err) == []
    with pytest.raises(SystemExit), one_message():
        raise UserError(" ".join(ALL))
    assert lacking(capsys.readouterr().err) == []


def test_halves_of_characters_are_shown_by_their_code(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out := io.BytesIO(), "utf-8"))
    print_text("a\ud83db")
    output_console().print(make_table("\udc00", ("", ""), [("\ud83d", "x")]))
    sys.stdout.flush()
    assert rb"a\ud83db" in out.getvalue() and rb"\udc00" in out.getvalue()
    assert plain("tab\tand\nnewline") == "tab\tand\nnewline"


def ink(tmp_path, label):
    """What `label` draws."""
    with figure(tmp_path / "x.png") as axes:
        axes.set_axis_off()
        axes.text(0.1, 0.5, label)
    return Image.open(tmp_path / "x.png").convert("L")


@pytest.mark.parametrize("text", [r"$\frac{$", "$x$", r"a\$b$c", r"\alpha"])
def test_a_label_draws_the_text_and_no_formula(tmp_path, text):
    with figure(tmp_path / "raw.png") as axes:
        axes.set_axis_off()
        axes.text(0.1, 0.5, text, parse_math=False)
    raw = Image.open(tmp_path / "raw.png").convert("L")
    assert ImageChops.difference(ink(tmp_path, chart_label(text)), raw).getbbox() is None


@pytest.mark.parametrize("draw", ["bars", "radar", "loss"])
def test_charts_are_drawn_whatever_the_names(tmp_path, draw):
    names = [*ALL, "x" * 5000, "\ud83d", ""]
    scores = {name: [50.0] * len(names) for name in names}
    if draw == "loss":
        names = [" ".join(WORDS), r"$\frac{$", "\ud83d"]
        for name in names:
            draw_loss([{"step": n, "loss": 2.0 / n} for n in (1, 2)], [], tmp_path / "a.png", name)
    else:
        (bars if draw == "bars" else radar)(tmp_path / "a.png", names, scores)
    assert Image.open(tmp_path / "a.png").size > (300, 300)


def test_a_name_with_an_underscore_stays_in_the_legend(tmp_path, monkeypatch):
    legends = []
    from matplotlib.figure import Figure

    legend = Figure.legend
    monkeypatch.setattr(Figure, "legend", lambda self, **o: legends.append(legend(self, **o)) or legends[-1])
    bars(tmp_path / "a.png", ["_tiny", "other"], {"mmstar": [1.0, 2.0]})
    assert [text.get_text().strip() for text in legends[0].get_texts()] == ["_tiny", "other"]


def test_the_table_of_a_training_run(capsys, tmp_path):
    numbers = dict.fromkeys(("final_loss", "tokens_per_second", "samples_per_second", "skipped_ffn_share"), 1.0)
    result = numbers | {"preset": " ".join(WORDS), "steps": 1, "truncated": 0, "seconds": 1.0}
    show_result(result, tmp_path / "[red]")
    shown = capsys.readouterr().out
    assert lacking(shown, WORDS) == [] and "[red]/loss.png" in shown


def test_no_message_repeats_thousands_of_characters():
    assert shortened("x" * 5000) == "x" * 80 + "... (5,000 characters)"
    assert shortened("short") == "short"


def calls(module: Path) -> set[str]:
    """Ways to print that a module uses: `print`, `echo`, or rich's own classes."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    found = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)} & {"print"}
    found |= {n.func.attr for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)} & {"echo"}
    imported = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    return found | {name for name in imported if name.split(".")[0] == "rich" and name == "rich.table"}


def test_programs_print_through_the_helpers_only():
    found = {}
    for package in ("llava_skip_base", "llava_skip", "train", "eval", "serve", "playground"):
        for file in (ROOT / package).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            found[name] = calls(file) - PRINTERS.get(name, set())
    assert {name for name, ways in found.items() if ways} == {"llava_skip_base.console"}
