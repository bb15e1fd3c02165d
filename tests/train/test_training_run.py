"""Whole runs: real processes, real DeepSpeed, the scripts that users call."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import llava_skip  # noqa: F401  (registers the Auto classes)
from playground.data.build import ensure_built

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    return ensure_built(folder / "digits", train_images=64)


def finetune(digits: Path, output: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "DATA": str(digits / "train.json"),
        "IMAGES": str(digits / "images"),
        "OUTPUT": str(output),
        "BATCH": "4",
        "TORCH_EXTENSIONS_DIR": str(output.parent / "operators"),
        **variables,
    }
    command = ["bash", "scripts/finetune_skip.sh", "--tokenizer", str(digits / "tokenizer"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "model"
    result = finetune(digits, output, "--max_steps", "4", "--logging_steps", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    return output, result


def test_a_run_on_the_cpu_compiles_nothing(finished):
    assert not (finished[0].parent / "operators").exists()


def test_two_deepspeed_processes_leave_a_model_that_loads(finished, digits):
    output, result = finished
    model = AutoModelForImageTextToText.from_pretrained(output)
    processor = AutoProcessor.from_pretrained(output)
    assert model.config.skip == {"retained": 16, "skipped": 20, "forget_cache": True}
    image = next((digits / "images").rglob("*.png"))
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": "How many digits?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


def test_a_run_leaves_metrics_and_a_figure(finished):
    output, result = finished
    metrics = json.loads((output / "train_result.json").read_text())
    assert metrics["steps"] == 4 and metrics["processes"] == 2
    assert metrics["samples"] == 4 * 2 * 4  # steps, processes, samples
    assert 0 < metrics["skipped_ffn_share"] < 0.5
    assert metrics["tokens_per_second"] > 0 and metrics["truncated"] == 0
    assert [entry["step"] for entry in metrics["history"]] == [1, 2, 3, 4]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"| final loss | {metrics['final_loss']:.4f} |" in (output / "README.md").read_text(encoding="utf-8")
    assert json.loads((output / "run.json").read_text())["data"]["max_length"] == 2048
    for text in ("final loss", "tokens/s", "tokens that skipped the FFN"):
        assert text in result.stdout


@pytest.mark.slow
def test_the_same_run_again_has_nothing_to_do(finished, digits):
    output, _ = finished
    before = (output / "model.safetensors").stat().st_mtime_ns
    again = finetune(digits, output, "--max_steps", "4", "--logging_steps", "1")
    assert again.returncode == 0, again.stderr
    assert "finished: nothing to do" in again.stderr
    assert (output / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (("--max_steps", "5"), {}, "holds another run (training.max_steps was 4 and is 5)"),
        pytest.param((), {"DATA": "nowhere.json"}, "error: DATA nowhere.json does not exist", marks=pytest.mark.slow),
        pytest.param((), {"IMAGES": "nowhere"}, "error: IMAGES nowhere does not exist", marks=pytest.mark.slow),
        pytest.param(
            (),
            {"PRESET": "sv-llava"},
            "error: Unknown preset 'sv-llava'; known: llava, sv-llava-64",
            marks=pytest.mark.slow,
        ),
        pytest.param(("--bogus", "1"), {}, "--bogus", marks=pytest.mark.slow),
        ((), {"NPROC": "0"}, "error: NPROC is '0'; it must be a number of processes, 1 or more."),
        ((), {"ZERO": "7"}, "error: ZERO is '7'; it must be 2, 3, 2_offload or 3_offload."),
    ],
)
def test_a_mistake_is_one_message(finished, digits, tmp_path, arguments, variables, message):
    output = finished[0] if "max_steps" in message else tmp_path / "new"
    result = finetune(digits, output, *arguments, **variables)
    assert result.returncode == 2, result.stdout + result.stderr
    assert message in result.stderr
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_missing_image_is_named_with_its_record(digits, tmp_path):
    records = json.loads((digits / "train.json").read_text())
    faulty = next(record for record in records if "image" in record)
    faulty["image"] = "train/lost.png"
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    result = finetune(digits, tmp_path / "new", DATA=str(data))
    assert result.returncode == 2
    assert f"(id {faulty['id']!r}): the image" in result.stderr and "train/lost.png does not exist" in result.stderr


@pytest.mark.slow
def test_zero_3_and_the_dense_preset_train_too(digits, tmp_path):
    for variables in ({"ZERO": "3"}, {"PRESET": "llava"}):
        output = tmp_path / "-".join(variables.values())
        result = finetune(digits, output, "--max_steps", "3", **variables)
        assert result.returncode == 0, result.stdout + result.stderr
        AutoModelForImageTextToText.from_pretrained(output)
