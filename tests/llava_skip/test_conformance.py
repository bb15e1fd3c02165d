import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from tests.conformance import GoldenFolder, check_golden
from tests.conformance.__main__ import GOLDENS, main


@pytest.mark.parametrize("name", sorted(GoldenFolder(GOLDENS).files))
def test_golden_is_reproduced(name):
    comparisons = check_golden(GoldenFolder(GOLDENS).files[name])
    assert comparisons
    assert [c for c in comparisons if not c.passed] == []


@pytest.fixture
def run(monkeypatch, capsys):
    def run(folder: Path, *options: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["conformance", str(folder), *options])
        with pytest.raises(SystemExit) as caught:
            main()
        return SimpleNamespace(returncode=caught.value.code, **capsys.readouterr()._asdict())

    return run


@pytest.fixture
def copy(tmp_path) -> Path:
    """A folder with three files of the goldens, one of them under another name."""
    index = json.loads((GOLDENS / "index.json").read_text())
    names = {"merge": "merge", "summary": "other_name", "llm_weights": "llm_weights"}
    for name, new in names.items():
        shutil.copyfile(GOLDENS / f"{name}.safetensors", tmp_path / f"{new}.safetensors")
    (tmp_path / "index.json").write_text(json.dumps({new: index[name] for name, new in names.items()}))
    return tmp_path


def test_command_agrees_and_writes_json(copy, tmp_path, run):
    result = run(copy, "--json", str(tmp_path / "out.txt"))
    assert result.returncode == 0, result.out + result.err
    assert "3 of 3 files agree" in result.out
    rows = json.loads((tmp_path / "out.txt").read_text())
    assert all(row["passed"] and row["comparisons"] for row in rows)


def test_command_fails_on_a_changed_value(copy, run):
    tensors = load_file(copy / "merge.safetensors")
    tensors["B1_N26_to16.out"] = tensors["B1_N26_to16.out"] + 1e-2
    save_file(tensors, copy / "merge.safetensors")
    result = run(copy)
    assert result.returncode == 1
    assert "2 of 3 files agree" in result.out and "B1_N26_to16 output" in result.out


def test_command_fails_on_an_unknown_kind_and_names_it(copy, run):
    index = json.loads((copy / "index.json").read_text())
    index["strange"] = {"family": "Z", "tensors": {"feature": [[1], "float32"]}}
    (copy / "index.json").write_text(json.dumps(index))
    (copy / "extra.json").write_text("{}")
    result = run(copy)
    assert result.returncode == 1
    assert result.out.count("unknown") == 2
    assert "3 of 5 files agree" in result.out


def test_command_refuses_a_folder_without_index(tmp_path, run):
    result = run(tmp_path)
    assert result.returncode == 2 and "index.json does not exist" in result.err
