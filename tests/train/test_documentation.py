"""Every command of docs/training.md runs, on stand-ins for big files; what trains, as a dry run."""

import json
import re
import shutil
import sys

import pytest
import torch

from playground.data.build import ensure_built
from tests.support.runs import ROOT, run, train
from tests.support.stand_ins import language_model, vision_tower
from train.recipe.recipes import recipe_names

PAGE = (ROOT / "docs/training.md").read_text()


def commands():
    """The commands of the page's bash blocks, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand_ins")
    digits = ensure_built(folder / "digits", train_images=8)
    language_model(folder / "llm", digits / "tokenizer")
    vision_tower(folder / "clip", layers=24)  # the resampler reads late layers
    sizes = {"0.weight": (32, 16), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    torch.save({f"model.mm_projector.{n}": torch.randn(s) for n, s in sizes.items()}, folder / "mm_projector.bin")
    sources = ["--model", str(folder / "llm"), "--vision_tower", str(folder / "clip"), "--template", "v1"]
    data = ["--data", str(digits / "train.json"), "--images", str(digits / "images"), "--max_steps", "1"]
    train(folder / "whole", *sources, *data)
    train(folder / "lora", *data, "--model", str(folder / "whole"), "--lora_enable", "true")
    return {
        "lmsys/vicuna-7b-v1.5": folder / "llm",
        "openai/clip-vit-large-patch14-336": folder / "clip",
        "blip_laion_cc_sbu_558k.json": digits / "captions.json",
        "llava_v1_5_mix665k.json": digits / "train.json",
        "mine/train.json": digits / "train.json",
        "mine/images": digits / "images",
        "playground/data": digits / "images",
        "IMAGES=images": f"IMAGES={digits / 'images'}",
        "--images images": f"--images {digits / 'images'}",
        " mm_projector.bin": f" {folder / 'mm_projector.bin'}",
        "checkpoints/pretrain": folder / "whole",
        "checkpoints/joined --vision": f"{folder / 'joined'} --vision",
        "checkpoints/joined": folder / "whole",
        "checkpoints/lora": folder / "lora",
        "checkpoints/mine --output": f"{folder / 'lora'} --output",
        "--model checkpoints/sv-llava-7b": f"--model {folder / 'whole'}",
        "checkpoints/": f"{folder}/new/",
    }


def with_stand_ins(command, stand_ins):
    """The command with small files instead of those that it, or its recipe, names."""
    recipe = re.search(r"--recipe (\S+)", command)
    if recipe and "--model" not in command and recipe[1] != "embedded":
        parts = recipe[1] in ("pretrain-558k", "finetune-665k-hd")
        command += " --model " + ("lmsys/vicuna-7b-v1.5" if parts else "checkpoints/pretrain")
        command += " --vision_tower openai/clip-vit-large-patch14-336" if parts else ""
    command = re.sub(r"^llava-skip ", f"{sys.executable} -m llava_skip ", command)
    for original, stand_in in stand_ins.items():
        command = command.replace(original, str(stand_in))
    return command


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_every_command_runs(command, stand_ins):
    command = with_stand_ins(command, stand_ins)
    if "scripts/" in command or "llava_skip train" in command:
        command += " --dry_run true"
    if "merge-lora" in command:  # the output of the run before it is made only outside of a dry run
        shutil.rmtree(re.search(r"--output (\S+)", command)[1], ignore_errors=True)
    result = run("bash", "-c", command, NPROC="1")
    assert result.returncode == 0, f"{command}\n{result.stdout[-1000:]}{result.stderr[-3000:]}"
    assert "dry run" in result.stdout or "written to" in result.stdout


def test_the_page_has_commands_and_names_recipes_and_metrics():
    assert len(commands()) >= 8
    assert [name for name in recipe_names() if f"`{name}`" not in PAGE] == []
    for name in ("tokens_per_second", "mfu", "skipped_ffn_share", "data_wait_seconds", "memory_peak_gib"):
        assert f"`{name}`" in PAGE
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert json.loads(example)[0]["conversations"][0]["value"].startswith("<image>\n")
