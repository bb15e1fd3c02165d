"""The model card: what is in it, whose file it is, and that nothing of others in it is markup."""

import re

import pytest
import yaml
from PIL import Image

from llava_skip import preset_config
from llava_skip.checkpoints.processor import load_processor
from llava_skip.convert import convert
from llava_skip.model_card import CARD, CardFacts, card_text, source_name, write_card
from llava_skip_base.files import read_json, write_json
from train.reporting.card import run_facts

HOSTILE = "a|b `c` <script>alert(1)</script> [x](y) **z**\n# t\x1b[31m: {evil: 1}"


def header_of(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def code_of(text: str, language: str) -> str:
    return re.search(rf"```{language}\n(.*?)\n```", text, re.DOTALL)[1]


def test_a_card_has_the_methods_numbers_and_the_hubs_header():
    text = card_text("mine", preset_config("sv-llava-100", "vicuna-7b"), CardFacts({"model": "lmsys/vicuna-7b-v1.5"}))
    assert header_of(text) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava", "llava-skip", "skip-vision"],
        "base_model": ["lmsys/vicuna-7b-v1.5"],
    }
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.MULTILINE))
    assert [rows[name] for name in ("retained (R)", "skipped (S)", "summaries")] == ["100", "156", "2"]
    assert rows["visual tokens before the language model"] == "576"
    assert rows["in attention"] == "258"
    assert rows["in the FFN, mean of the layers"] == rows["in the cache after the prompt"] == "102"
    assert rows["language model"] == "llama, 32 layers of width 4096"
    dense = card_text("mine", preset_config("llava", "vicuna-7b"), CardFacts({"model": None}))
    assert "retained" not in dense and "base_model" not in header_of(dense) and "Made from" not in dense


def test_nothing_of_others_is_markup(tmp_path):
    facts = CardFacts({"model": HOSTILE}, rows=[("data", HOSTILE)], note=HOSTILE)
    text = card_text(HOSTILE, preset_config("llava", "tiny"), facts)
    outside = re.sub(r"```.*?```", "", text.split("---\n", 2)[2], flags=re.DOTALL)
    assert "\x1b" not in text and "<script" not in outside.replace(r"\<script", "")
    assert not re.search(r"(?<!\\)(\[x|\*\*z|`c)", outside)
    (title,) = [line for line in outside.splitlines() if line.startswith("# ")]
    assert title.startswith("# a\\|b")
    assert [line for line in outside.splitlines() if line.startswith("| data")][0].count(" | ") == 1
    assert "evil" not in header_of(text)
    compile(code_of(text, "python"), "card", "exec")
    assert len(code_of(text, "bash").splitlines()) == 2


def test_a_card_of_somebody_else_is_kept_and_the_own_is_written_again(tmp_path):
    config = preset_config("llava", "tiny")
    write_card(tmp_path, config, CardFacts({}, rows=[("steps", "1")]))
    write_card(tmp_path, config, CardFacts({}, rows=[("steps", "2")]))
    own = (tmp_path / CARD).read_text(encoding="utf-8")
    assert "| steps | 2 |" in own
    changed = "\n".join(line for line in own.splitlines() if "Written by llava-skip" not in line)
    (tmp_path / CARD).write_text(changed, encoding="utf-8")
    write_card(tmp_path, config, CardFacts({}, rows=[("steps", "3")]))
    assert (tmp_path / CARD).read_text(encoding="utf-8") == changed


@pytest.mark.parametrize("content", ["# Mod\xe8le".encode("latin-1"), "# mine".encode("utf-16"), b"", "folder", "link"])
def test_what_cannot_be_read_under_the_cards_name_is_somebody_elses(tmp_path, content):
    file = tmp_path / CARD
    if content == "folder":
        file.mkdir()
    elif content == "link":
        file.symlink_to("nowhere")
    else:
        file.write_bytes(content)
    write_card(tmp_path, preset_config("llava", "tiny"), CardFacts({}))
    assert file.is_dir() if content == "folder" else file.is_symlink() if content == "link" else (
        file.read_bytes() == content)  # fmt: skip


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("owner/data", "owner/data"), ("/home/me/t.json", "t.json"), ("~/secret/x.json", "x.json"),
        (r"C:\Users\me\t.json", "t.json"), (r"C:\Users/model", "model"),
        ("/home/me/a.json,/home/you/b.json", "a.json, b.json"), ("/home/me/a.json, owner/b", "a.json, owner/b"),
    ],
)  # fmt: skip
def test_of_paths_the_last_part_alone_is_shown(source, name):
    assert source_name(source) == name


def test_a_base_model_is_a_hub_name_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints/mine").mkdir(parents=True)
    sources = {"model": "checkpoints/mine", "vision tower": "openai/clip", "tokenizer": "owner/words"}
    text = card_text("x", preset_config("llava", "tiny"), CardFacts(sources))
    assert header_of(text)["base_model"] == ["openai/clip"] and "| model | mine |" in text
    assert "pip install llava" not in text


def test_the_python_of_a_converted_models_card_runs(saved_dense, tmp_path, monkeypatch, capsys):
    output = tmp_path / "it's new"
    convert(str(saved_dense), output, preset="sv-llava-64")
    text = (output / CARD).read_text(encoding="utf-8")
    assert "newly initialised" in text and "| checkpoint | dense |" in text and "base_model" not in header_of(text)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 20), "teal").save("picture.png")
    short = read_json(output / "generation_config.json") | {"max_new_tokens": 3}
    write_json(output / "generation_config.json", short)
    capsys.readouterr()
    exec(code_of(text, "python"), {})
    assert load_processor(output).chat_template and capsys.readouterr().out.strip()
    convert(str(output), tmp_path / "same", preset=None)
    assert "newly initialised" not in (tmp_path / "same" / CARD).read_text(encoding="utf-8")


@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_runs_card_has_data_and_results(is_adapter):
    resolved = {
        "model": {"model": "owner/llm", "vision_tower": None, "projector": None, "tokenizer": "/home/me/tokens",
                  "lora_enable": is_adapter, "lora_r": 8},
        "data": {"data": "/home/me/private/train.json", "eval_data": None},
    }  # fmt: skip
    result = {
        "steps": 1974, "samples": 31584.0, "supervised": 716154.0, "final_loss": 0.0374, "parameters": 1610753,
        "validation": [{"eval_loss": 0.5}], "benchmarks": [{"step": 9, "scores": {"digits": 91.25, "mme": None}}],
        "exported": "checkpoint-9",
    }  # fmt: skip
    text = card_text("run", preset_config("sv-llava-64", "tiny"), run_facts(resolved, result, is_adapter))
    for row in ("data | train.json", "steps | 1,974", "final loss | 0.0374", "validation loss | 0.5000",
                "digits at step 9 | 91.2", "tokenizer | tokens", "parameters | 1,610,753"):  # fmt: skip
        assert f"| {row} |" in text
    assert "/home/me" not in text and "mme" not in text
    assert header_of(text)["library_name"] == ("peft" if is_adapter else "transformers")
    assert ("merge-lora run" in text) == is_adapter
