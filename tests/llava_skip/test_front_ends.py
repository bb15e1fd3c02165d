"""The registry of front ends, and the page that adds one from outside the package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_skip import LlavaSkipConfig
from llava_skip.presets import PRESETS, register_preset
from llava_skip.vision import FrontEnd, get_front_end, register_front_end
from playground.data.build import ensure_built

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/add-a-front-end.md").read_text(encoding="utf-8")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="front_end is 'lava'; known: llava, hd, cos"):
        LlavaSkipConfig(front_end="lava")


def test_a_name_is_given_once():
    class Another(FrontEnd):
        name = "hd"

    with pytest.raises(ValueError, match="There is a front end 'hd' already"):
        register_front_end(Another())
    assert type(get_front_end("hd")) is not Another
    with pytest.raises(ValueError, match="There is a preset 'llava' already"):
        register_preset(PRESETS["llava"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder with the file of the page and a small data set."""
    folder = tmp_path_factory.mktemp("user")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (folder / "my_front_end.py").write_text(code)
    ensure_built(folder / "digits", train_images=48)
    return folder


def run(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "LLAVA_SKIP_PLUGINS": "my_front_end", **variables}
    return subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_front_end_from_outside_is_trained_and_evaluated(folder):
    data = ["--data", "digits/train.json", "--images", "digits/images", "--tokenizer", "digits/tokenizer"]
    options = ["--preset", "sv-pooled", "--template", "v1", "--max_steps", "3", "--per_device_train_batch_size", "4"]
    trained = run(folder, "train.train", *data, *options, "--use_cpu", "true", "--output_dir", "run")
    assert trained.returncode == 0, trained.stderr[-3000:]
    config = json.loads((folder / "run" / "config.json").read_text())
    assert (config["front_end"], config["skip"]["retained"], config["skip"]["skipped"]) == ("pooled", 9, 20)
    assert json.loads((folder / "run" / "train_result.json").read_text())["steps"] == 3
    options = ["--benchmarks", "mmstar", "--limit", "4", "--data", "digits/eval/mmstar.tsv", "--output", "scores"]
    evaluated = run(folder, "eval.run", "--model", "run", *options)
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    assert len(json.loads((folder / "scores/mmstar/run/predictions.json").read_text())) == 4


def test_a_plugin_that_is_missing_is_named(folder):
    result = run(folder, "train.train", "--help", LLAVA_SKIP_PLUGINS="no_such_module")
    assert result.returncode != 0 and "no_such_module" in result.stderr
