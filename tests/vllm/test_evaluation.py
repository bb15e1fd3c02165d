"""`llava-skip eval --engine vllm`: the answers and files of an evaluation with `generate`, and its resuming."""

import base64
import csv
import io
import json

import pytest
from typer.testing import CliRunner

from eval.run import app
from tests.support.conversations import random_image
from tests.support.small_models import SKIP
from tests.vllm.engines import save

COLUMNS = ["index", "question", "answer", "category", "l2_category", "image"]


@pytest.fixture
def data(tmp_path):
    """Questions of a benchmark's file; the embedded data set need not be there."""
    rows = []
    for number in range(6):
        random_image(seed=number).save(file := io.BytesIO(), "PNG")
        image = base64.b64encode(file.getvalue()).decode()
        rows.append([number, f"Is it {number}? A: yes B: no", "A", "math", "geometry", image])
    with open(path := tmp_path / "mmstar.tsv", "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([COLUMNS, *rows])
    return path


def test_answers_files_and_resuming(tmp_path, data, monkeypatch):
    monkeypatch.setenv("LLAVA_SKIP_HOME", str(tmp_path))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    model, results = save(tmp_path / "model", SKIP), {}
    words = ["--benchmarks", "mmstar", "--data", str(data), "--model", str(model), "--max-new-tokens", "8"]

    def evaluate(output: str, *options: str):
        done = CliRunner().invoke(app, [*words, "--batch-size", "4", "--output", str(tmp_path / output), *options])
        assert done.exit_code == 0, done.output
        return done.output

    evaluate("transformers")
    evaluate("vllm", "--engine", "vllm", "--limit", "4")
    assert "4 of 6 answers were there already" in evaluate("vllm", "--engine", "vllm")
    for engine in ("transformers", "vllm"):
        folder = tmp_path / engine / "mmstar" / "model"
        results[engine] = {
            name: (folder / name).read_text() for name in ("predictions.json", "per_sample.json", "answers.jsonl")
        }
        results[engine]["run"] = json.loads((folder / "run.json").read_text())
    other, own = results["transformers"].pop("run"), results["vllm"].pop("run")
    assert results["vllm"] == results["transformers"]
    assert any(json.loads(results["vllm"]["predictions.json"]).values())
    assert own.pop("engine").startswith("vllm ")
    assert own == other
    again = CliRunner().invoke(app, [*words, "--batch-size", "4", "--output", str(tmp_path / "vllm")])
    assert again.exit_code != 0  # the answers of another engine are in that folder
