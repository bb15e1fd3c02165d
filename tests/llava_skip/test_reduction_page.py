"""docs/add-a-rival.md: its file, from outside of the package, trains, and its model needs it to load."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llava_skip.reduction.method as method
from llava_skip import LlavaSkipForConditionalGeneration
from llava_skip.reduction import get_reduction, reduction_names, register_reduction
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json
from playground.data.build import ensure_built

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/add-a-rival.md").read_text(encoding="utf-8")
RIVALS = (ROOT / "docs/rivals.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_rival_from_outside_is_trained_and_its_model_names_it(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (reduction,) = re.findall(r"--reduction (\S+)", PAGE)
    (tmp_path / "my_rival.py").write_text(code)
    digits = ensure_built(tmp_path / "digits", train_images=16)
    data = ["--data", str(digits / "train.json"), "--images", str(digits / "images")]
    words = [*data, "--tokenizer", str(digits / "tokenizer"), "--template", "v1", "--reduction", reduction]
    words += ["--max_steps", "1", "--per_device_train_batch_size", "4", "--use_cpu", "true", "--output_dir", "loud"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "LLAVA_SKIP_PLUGINS": "my_rival"}
    command = [sys.executable, "-m", "train.train", *words]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    config = read_json(tmp_path / "loud" / "config.json")
    assert config["reduction"] == {"method": "loudest", "tokens": 12, "upper": 4} and config["preset"] == "llava"
    with pytest.raises(UserError, match="the method is 'loudest'; known: random, grid"):
        LlavaSkipForConditionalGeneration.from_pretrained(tmp_path / "loud")
    monkeypatch.setattr(method, "_REDUCTIONS", dict(method._REDUCTIONS))
    exec(code, {})
    model = LlavaSkipForConditionalGeneration.from_pretrained(tmp_path / "loud")
    assert model.model.encode_images(torch.randn(2, 3, 48, 48)).shape[1] == 12
    with pytest.raises(UserError, match="There is a reduction 'loudest' already"):
        register_reduction(get_reduction("loudest"))


def test_the_page_of_rivals_names_each_of_them():
    assert [name for name in reduction_names() if f"| `{name}" not in RIVALS] == []
