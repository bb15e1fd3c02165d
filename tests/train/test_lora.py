"""LoRA from the command line: what is saved, who reads it, and that merging changes no logit."""

import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.quantizers.quantizers_utils import should_convert_module

import llava_skip  # noqa: F401  (registers the Auto classes)
from llava_skip.checkpoints import load_checkpoint
from llava_skip.folder_code import FILE
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json
from playground.data.build import ensure_built
from tests.support.runs import train
from tests.support.small_models import small_model
from tests.support.stand_ins import language_model, vision_tower
from train.arguments import ModelArguments
from train.merge_lora import load_base, merge
from train.recipe.lora import check_lora, quantization_config
from train.run import parse


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    digits = ensure_built(folder / "digits", train_images=16)
    language_model(folder / "llm", digits / "tokenizer")
    vision_tower(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def data(folders):
    digits = folders / "digits"
    return [
        "--data", str(digits / "train.json"), "--images", str(digits / "images"), "--max_steps", "2",
        "--per_device_train_batch_size", "2", "--gradient_checkpointing", "true",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def adapter(folders, data):
    sources = ["--model", str(folders / "llm"), "--vision_tower", str(folders / "clip"), "--template", "v0"]
    train(folders / "run", *data, *sources, "--lora_enable", "true", "--lora_r", "4", "--learning_rate", "5e-2")
    return folders / "run"


@pytest.fixture(scope="module")
def inputs(adapter, folders):
    processor = AutoProcessor.from_pretrained(adapter)
    image = next((folders / "digits" / "images").rglob("*.png"))
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": "How many digits?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )


@torch.no_grad()
def logits_of(model, inputs):
    return model.eval()(**inputs).logits


def test_an_adapter_folder_holds_what_was_trained_and_no_more(adapter):
    names = {name for name in PeftModel.from_pretrained(load_base(adapter, None, None), adapter).state_dict()}
    assert any(".lora_A." in name for name in names)
    assert not any("vision_tower" in name and ".lora_" in name for name in names)
    assert not (adapter / "model.safetensors").exists()
    assert read_json(adapter / "run.json") == read_json(adapter / "checkpoint-2/run.json")
    assert AutoConfig.from_pretrained(adapter).preset == "sv-llava-256"
    card = (adapter / "README.md").read_text(encoding="utf-8")
    assert (adapter / "README.md").stat().st_mtime_ns >= (adapter / "train_result.json").stat().st_mtime_ns  # the last
    assert "merge-lora run" in card and "| steps | 2 |" in card and (adapter / FILE).is_file()


def test_merged_logits_are_those_of_the_adapter(adapter, inputs, tmp_path):
    base = load_base(adapter, None, None)
    base_parameters = base.num_parameters()
    before = logits_of(base, inputs)
    adapted = logits_of(PeftModel.from_pretrained(base, adapter), inputs)
    shutil.copytree(read_json(adapter / "run.json")["model"]["model"], tmp_path / "moved")
    merge(adapter, tmp_path / "merged", base=str(tmp_path / "moved"))
    merged = logits_of(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged"), inputs)
    assert (adapted - before).abs().max() > 1e-2
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-5)
    assert read_json(tmp_path / "merged/generation_config.json")["stop_strings"] == ["###"]
    card = (tmp_path / "merged/README.md").read_text(encoding="utf-8")
    assert "| data | train.json |" in card and "library_name: transformers" in card
    assert "| model | moved |" in card and "base_model" not in card
    assert f"| parameters | {base_parameters:,} |" in card
    assert read_json(tmp_path / "merged/config.json")["auto_map"] and (tmp_path / "merged" / FILE).is_file()
    AutoProcessor.from_pretrained(tmp_path / "merged")


def test_peft_and_the_library_read_an_adapter_over_a_saved_model(adapter, inputs, folders, data, tmp_path):
    native = folders / "native"
    base = load_base(adapter, None, None)
    base.save_pretrained(native)
    AutoProcessor.from_pretrained(adapter).save_pretrained(native)
    train(tmp_path / "run", *data, "--model", str(native), "--lora_enable", "true", "--learning_rate", "5e-2")
    saved = AutoModelForImageTextToText.from_pretrained(native)
    adapted = logits_of(PeftModel.from_pretrained(saved, tmp_path / "run"), inputs)
    assert (adapted - logits_of(load_checkpoint(native), inputs)).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(load_checkpoint(native, lora=tmp_path / "run"), inputs), adapted)


@pytest.mark.parametrize(
    ("template", "ends", "strings"),
    [("v0", ["<|end_of_text|>"], ["###"]), ("llama3", ["<|eot_id|>", "<|end_of_text|>"], None)],
)
def test_a_run_saves_where_its_template_ends_an_answer(folders, data, tmp_path, template, ends, strings):
    words = AutoTokenizer.from_pretrained(folders / "digits" / "tokenizer")
    words.eos_token = "<|end_of_text|>"  # as LLaMA-3's base, not its chat model
    words.save_pretrained(tmp_path / "words")
    language_model(tmp_path / "llm", tmp_path / "words")
    sources = ["--model", str(tmp_path / "llm"), "--vision_tower", str(folders / "clip"), "--template", template]
    train(tmp_path / "run", *data, *sources)
    for folder in ("run", "run/checkpoint-2"):
        saved = read_json(tmp_path / folder / "generation_config.json")
        assert saved["eos_token_id"] == words.convert_tokens_to_ids(ends)
        assert saved.get("stop_strings") == strings


def test_merging_refuses_what_it_cannot_merge(adapter, folders, tmp_path):
    for source, output, message in (
        (folders / "llm", tmp_path / "new", "must hold adapter_config.json and run.json"),
        (adapter, adapter, "is not empty: name a new folder"),
    ):
        with pytest.raises(UserError, match=message):
            merge(source, output)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora_enable true", "adapts a pretrained model"),
        ("--model m --lora_enable true --train_parts summary", "add language_model"),
        ("--model m --bits 4", "add --lora_enable true"),
        ("--model m --bits 5", "must be 16 or 8 or 4"),
        ("--model m --bits 4 --lora_enable true --vision_tower t", "llava-skip convert m JOINED"),
        ("--model m --bits 8 --lora_enable true", "needs bitsandbytes"),
        ("--model m --lora_enable true --lora_bias all", "must be none or lora_only"),
    ],
)
def test_what_lora_needs_is_said_before_weights_load(words, message, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        model, _, _ = parse([*words.split(), "--use_cpu", "true", "--data", "d", "--output_dir", str(tmp_path / "o")])
        check_lora(model)


def test_quantization_leaves_all_but_the_language_model_whole():
    settings = quantization_config(ModelArguments(model="m", lora_enable=True, bits=4), torch.bfloat16)
    assert quantization_config(ModelArguments(), torch.bfloat16) is None
    assert settings.load_in_4bit and settings.bnb_4bit_quant_type == "nf4" and settings.bnb_4bit_use_double_quant
    names = [name for name, module in small_model().named_modules() if isinstance(module, torch.nn.Linear)]
    quantised = {name for name in names if should_convert_module(name, settings.llm_int8_skip_modules)}
    assert quantised and quantised == {name for name in names if name.startswith("model.language_model.layers.")}


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4", "8"])
def test_qlora_trains_and_merges(bits, adapter, folders, data, tmp_path):
    pytest.importorskip("bitsandbytes")
    merge(adapter, tmp_path / "base")
    options = ["--model", str(tmp_path / "base"), "--lora_enable", "true", "--bits", bits, "--bf16", "true"]
    result = train(tmp_path / "run", *data, *options)
    assert 5 < result["final_loss"] < 8
    merge(tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config") and merged.dtype == torch.bfloat16
