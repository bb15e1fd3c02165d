"""The cases of `tests/cases/eval`: what users brought, and what is right."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eval.benchmarks.mmbench import MMBench
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


@pytest.mark.parametrize("name", ["plain.tsv", "data_uri.tsv"])
def test_images_as_base64_and_as_data_uris(tmp_path: Path, name: str) -> None:
    samples = MMBench().load(Path(shutil.copy(CASES / name, tmp_path)))
    plain = MMBench().load(CASES / "plain.tsv")
    assert len(samples) == 12
    for one, other in zip(samples, plain, strict=True):
        assert one.images[0].open().tobytes() == other.images[0].open().tobytes()
