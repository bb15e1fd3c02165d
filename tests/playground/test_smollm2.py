"""The real small language model: joined with the embedded tower, trained on the digits, and evaluated."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from llava_skip.checkpoints import load_checkpoint
from llava_skip_base.errors import MissingPackageError, UserError
from llava_skip_base.files import read_json, read_json_lines
from playground.smollm2 import INSTALL, ensure_smollm2, smollm2_file
from tests.support.runs import ENVIRONMENT, ROOT


def test_missing_packages_are_one_message_that_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=INSTALL):
        ensure_smollm2(tmp_path / "smollm2")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_model_is_not_overwritten(monkeypatch, tmp_path):
    monkeypatch.setattr("playground.smollm2.smollm2_file", lambda: tmp_path / "x.gguf")
    (tmp_path / "smollm2").mkdir()
    with pytest.raises(UserError, match="is there, and holds no model"):
        ensure_smollm2(tmp_path / "smollm2")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with SmolLM2 and a short embedded run, which lends its tower."""
    try:
        smollm2_file()
    except MissingPackageError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("home")
    (folder / "playground").mkdir()
    (folder / "playground" / "data").symlink_to(ROOT / "playground" / "data")
    program(
        folder,
        "train",
        "--recipe",
        "embedded",
        "--max_steps",
        "40",
        "--output_dir",
        f"{folder}/checkpoints/sv-llava-256",
    )
    return folder


def program(home: Path, *words: str) -> str:
    """A program of the project with its folders in `home`, to its end; what it printed."""
    result = subprocess.run(
        [sys.executable, "-m", "llava_skip", *words], cwd=home, capture_output=True, text=True, timeout=900,
        env=ENVIRONMENT | {"LLAVA_SKIP_HOME": str(home), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_joined_with_a_tower_it_answers_text_as_before(home):
    folder = ensure_smollm2(home / "checkpoints" / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stock = LlamaForCausalLM.from_pretrained(folder).eval()
    joined = load_checkpoint(folder, "sv-llava-256", vision_tower=str(home / "checkpoints" / "sv-llava-256"))
    for question in ("What is the capital of France?", "Name three colors.", "What is 2 + 3?"):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            expected, logits = stock(**prompt).logits, joined(**prompt).logits
        assert torch.equal(logits[..., : expected.shape[-1]], expected)
        settings = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=2, pad_token_id=2)
        answers = [model.generate(**prompt, generation_config=settings) for model in (stock, joined)]
        assert torch.equal(*answers)
    assert "Paris" in tokenizer.decode(
        stock.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=4)[0]
    )


@pytest.mark.slow
def test_it_is_aligned_tuned_and_stops_where_its_template_ends(home):
    program(home, "train", "--recipe", "embedded-smollm2-align", "--max_steps", "8", "--logging_steps", "1")
    aligned = read_json(home / "checkpoints/embedded-smollm2-align/train_result.json")["history"]
    assert aligned[-1]["loss"] < aligned[0]["loss"] / 2
    program(home, "train", "--recipe", "embedded-smollm2", "--max_steps", "6", "--logging_steps", "1")
    tuned = read_json(home / "checkpoints/embedded-smollm2/train_result.json")["history"]
    assert tuned[-1]["loss"] < tuned[0]["loss"] / 2
    merged = home / "checkpoints/merged"
    program(home, "merge-lora", f"{home}/checkpoints/embedded-smollm2", "--output", str(merged))
    end = AutoTokenizer.from_pretrained(merged).convert_tokens_to_ids("<|im_end|>")
    ends = GenerationConfig.from_pretrained(merged).eos_token_id
    assert end in (ends if isinstance(ends, list) else [ends])
    program(
        home, "eval", "--model", str(merged), "--benchmarks", "mmstar", "--limit", "8", "--output", f"{home}/results"
    )
    answers = [
        value["prediction"] for path in home.glob("results/**/answers.jsonl") for _, value in read_json_lines(path)
    ]
    assert len(answers) == 8 and all(len(answer.split()) < 8 and "<|" not in answer for answer in answers), answers
