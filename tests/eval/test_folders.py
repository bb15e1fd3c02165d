"""Where `eval.run` finds and puts things when no path, or a path with `~`, is given."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `eval.run` in another folder, with `LLAVA_SKIP_HOME` and the user's home as given."""

    def run(*options: object, **folders: Path) -> subprocess.CompletedProcess[str]:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {name: str(path) for name, path in folders.items()}
        command = [sys.executable, "-m", "eval.run", "--max-new-tokens", "1", *map(str, options)]
        return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)

    return run


def test_defaults_are_found_from_another_folder(
    evaluate: Callable[..., subprocess.CompletedProcess[str]],
    saved: Path,
    write_tsv: Callable[..., Path],
    mmstar_rows: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    done = evaluate(LLAVA_SKIP_HOME=home)
    assert done.returncode == 2 and "build it with 'llava-skip data'" in done.stderr, done.stderr
    write_tsv(mmstar_rows, "home/playground/data/digits/eval/mmstar.tsv")
    done = evaluate(LLAVA_SKIP_HOME=home)
    assert done.returncode == 2 and "checkpoints/ holds none; train one" in done.stderr, done.stderr
    shutil.copytree(saved, home / "checkpoints/random")
    done = evaluate(LLAVA_SKIP_HOME=home)
    assert done.returncode == 0, done.stderr
    result = json.loads((home / "results/mmstar/random/results.json").read_text())
    assert result["model"]["path"] == str(home / "checkpoints/random")


def test_a_tilde_is_the_users_folder_in_every_path(
    evaluate: Callable[..., subprocess.CompletedProcess[str]],
    saved: Path,
    write_tsv: Callable[..., Path],
    mmstar_rows: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    user = tmp_path / "user"
    rows = [{**row, "image": "", "imagename": "a.png"} for row in mmstar_rows]
    write_tsv(rows, "user/data.tsv")
    shutil.copytree(saved, user / "random")
    (user / "shown").mkdir()
    Image.new("RGB", (8, 8)).save(user / "shown/a.png")
    done = evaluate(
        "--model", "~/random", "--benchmarks", "mmstar", "--data", "mmstar=~/data.tsv", "--images", "~/shown",
        "--output", "~/out", HOME=user,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (user / "out/mmstar/random/results.json").is_file()
    assert not (tmp_path / "elsewhere/~").exists()
