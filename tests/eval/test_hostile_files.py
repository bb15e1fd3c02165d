"""Texts of benchmark files, answers, models and results in everything that evaluation prints and draws."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import eval.answering.generate
import eval.compare
import eval.overview
import eval.run
import eval.score
from tests.support.answering import AtOnce
from tests.support.hostile import ALL, ESCAPES, WORDS, lacking

Rows = list[dict[str, Any]]


class Parrot(AtOnce):
    """A fake model that answers with the hostile texts."""

    def __init__(self, *_: Any) -> None:
        pass

    def answer(self, prompts: Sequence[str], images: Any, max_new_tokens: int) -> list[str]:
        return [" ".join(ALL)] * len(prompts)


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mmstar_rows: Rows, write_tsv: Callable[..., Path]) -> Path:
    """An MMStar file whose questions, categories and ids are hostile."""
    monkeypatch.setattr(eval.answering.generate, "Generator", Parrot)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    rows = [
        {**mmstar_rows[n % 5], "index": f"{word} {n}", "category": word, "l2_category": word, "question": f"Is {word}?"}
        for n, word in enumerate(ALL)
    ]
    return write_tsv(rows, "[red].tsv")


def start(app: Any, *words: object) -> Result:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done


def test_run_compare_and_overview(hostile: Path, model_folder: Path) -> None:
    first = model_folder.rename(model_folder.with_name("[b]"))
    models = [first, shutil.copytree(first, first.with_name("_$x$"))]
    words = [word for model in models for word in ("--model", model)]
    done = start(eval.run.app, "--benchmarks", "mmstar", "--data", hostile, *words)
    assert lacking(done.output) == []
    assert "mmstar: [b]" in done.output and "mmstar: _$x$" in done.output
    radar = Path("results/overview/radar-mmstar.png")
    assert radar.is_file()
    done = start(eval.compare.app, *(Path("results/mmstar") / model.name for model in models))
    assert "A: [b]" in done.output and "B: _$x$" in done.output
    text = Path("results/overview/overview.md").read_text()
    assert r"\[b\]" in text and r"\_\$x\$" in text and "[b]" not in text
    page = Path("results/overview/mmstar.html").read_text()
    assert "<b>bold</b>" not in page and "&lt;b&gt;bold&lt;/b&gt;" in page and "$\\frac{$" in page


def test_a_saved_prediction_file(hostile: Path, tmp_path: Path) -> None:
    file = tmp_path / "[bold]p.jsonl"
    rows = [{"index": f"{word} {n}", "prediction": word} for n, word in enumerate(ALL)]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"index": "[/INST]\x1b[0m", "prediction": ""}]))
    done = start(eval.score.app, "mmstar", "--predictions", file, "--data", hostile, "--json", tmp_path / "[i].json")
    assert lacking(done.output, (*WORDS, *ESCAPES)) == []
    assert "mmstar: [bold]p.jsonl" in done.output and r"[/INST]\u001b[0m" in done.output and "[i].json" in done.output


def test_messages_about_such_files(hostile: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"index": " ".join(ALL[:5]) + "\x1b[31m", "prediction": ""}))
    done = CliRunner().invoke(
        eval.score.app,
        ["mmstar", "--predictions", str(file), "--data", str(hostile), "--json", str(tmp_path / "o.json")],
    )
    assert done.exit_code == 2 and "[/b] [/INST] [red]" in done.stderr and "\x1b" not in done.stderr
