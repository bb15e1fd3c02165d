"""Saved predictions that users brought, in `tests/cases/eval`, and what is right."""

from pathlib import Path

from typer.testing import CliRunner

from eval.score import app

CASES = Path(__file__).parents[1] / "cases/eval"


def test_answers_of_which_no_rule_can_read_any_are_told_on_screen(tmp_path: Path) -> None:
    words = [
        "mmbench",
        "--predictions",
        CASES / "pred_cn.jsonl",
        "--data",
        CASES / "plain.tsv",
        "--json",
        tmp_path / "o",
    ]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0
    assert "note: 12 of 12 answers name no option by this rule and count as wrong" in done.output
