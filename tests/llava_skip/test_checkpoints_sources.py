"""One configuration for each set of sources, found wherever they are; a broken source is named."""

import json
import shutil
import zipfile

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, set_seed
from typer.testing import CliRunner

from llava_skip import AutoProcessor
from llava_skip.checkpoints import load_checkpoint, load_config, load_tokenizer
from llava_skip.checkpoints.adapters import find_projector
from llava_skip.checkpoints.files import check_model_weights, read_tensors
from llava_skip.convert import convert
from llava_skip_base.console import make_app
from llava_skip_base.errors import MissingFileError, UserError
from tests.support.stand_ins import language_model, vision_tower, word_tokenizer

SETTINGS = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "vocab_size": 90, "hidden_size": 32}
SETTINGS |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "mm_vision_select_layer": -1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    language_model(folder / "llm", word_tokenizer(folder / "words"))
    vision_tower(folder / "clip")
    mlp = {"0.weight": torch.randn(32, 16), "0.bias": torch.randn(32)}
    mlp |= {"2.weight": torch.randn(32, 32), "2.bias": torch.randn(32)}
    linear = {"weight": torch.randn(32, 16), "bias": torch.randn(32)}
    for name, weights in (("mlp", mlp), ("linear", linear), ("settings", mlp)):
        (folder / name).mkdir()
        tensors = {f"model.mm_projector.{key}": tensor for key, tensor in weights.items()}
        torch.save(tensors, folder / name / "mm_projector.bin")
    (folder / "settings" / "config.json").write_text(json.dumps(SETTINGS))
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(folder / "llm"), LoraConfig(r=2, target_modules=["q_proj"])
    )
    adapted.save_pretrained(folder / "lora")
    return folder


@pytest.mark.parametrize("projector", [None, "mlp", "linear", "settings"])
@pytest.mark.parametrize("preset", [None, "sv-llava-256", "llava-hd"])
def test_the_configuration_needs_no_weights_and_is_that_of_the_loaded_model(folder, tmp_path, preset, projector):
    sources = {"vision_tower": str(folder / "clip"), "projector": projector and folder / projector}
    for name in ("llm", "clip"):
        shutil.copytree(folder / name, tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
    without = sources | {"vision_tower": str(tmp_path / "clip")}
    config, words = load_config(tmp_path / "llm", preset, **without)
    assert words.convert_tokens_to_ids("<image>") == config.image_token_id == 100
    assert config.text_config.vocab_size == 128 and words.pad_token == "<unk>"
    assert config.vision_feature_layer == (-1 if projector == "settings" else -2)

    set_seed(1)
    given = load_checkpoint(folder / "llm", config=config, **sources, log=False)
    set_seed(1)
    own = load_checkpoint(folder / "llm", preset, **sources, log=False)
    assert given.config.to_dict() == own.config.to_dict()
    assert str(given.load_report) == str(own.load_report)
    for name, tensor in own.state_dict().items():
        assert torch.equal(given.state_dict()[name], tensor), name


def test_another_tokenizer_decides_the_image_token(folder, tmp_path):
    tokenizer = word_tokenizer(tmp_path, 130)
    config, words = load_config(folder / "llm", vision_tower=str(folder / "clip"), tokenizer=tokenizer)
    assert config.image_token_id == 130 and config.text_config.vocab_size == 192 and len(words) == 131
    model = load_checkpoint(folder / "llm", config=config, vision_tower=str(folder / "clip"), log=False)
    assert model.get_input_embeddings().weight.shape[0] == 192


def test_one_choice_of_what_is_skipped(folder):
    config, _ = load_config(folder / "llm", vision_tower=str(folder / "clip"))
    with pytest.raises(UserError, match="Give preset or skip or config"):
        load_checkpoint(folder / "llm", "llava", config=config, vision_tower=str(folder / "clip"))


def test_the_users_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    model = load_checkpoint("~/llm", vision_tower="~/clip", projector="~/mlp", lora="~/lora", log=False)
    expected = read_tensors(folder / "mlp" / "mm_projector.bin")["model.mm_projector.0.bias"]
    assert torch.equal(model.model.multi_modal_projector.linear_1.bias, expected)
    assert find_projector("~/mlp/mm_projector.bin") == folder / "mlp" / "mm_projector.bin"
    assert len(load_config("~/llm", vision_tower="~/clip", projector="~/mlp", tokenizer="~/words")[1]) == 101
    settings = SETTINGS | {"mm_vision_tower": "~/clip"}
    (folder / "settings" / "config.json").write_text(json.dumps(settings))
    assert load_config("~/llm", projector="~/settings")[0].vision_feature_layer == -1
    words = ["~/llm", "~/converted", "--vision-tower", "~/clip", "--projector", "~/mlp", "--template", "v1"]
    result = CliRunner().invoke(make_app(convert), [*words, "--lora", "~/lora", "--dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    assert len(AutoProcessor.from_pretrained(folder / "converted").tokenizer) == 101
    assert {tensor.dtype for tensor in load_file(folder / "converted" / "model.safetensors").values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("name", ["path", "vision_tower", "projector", "lora"])
@pytest.mark.parametrize("missing", ["~/nowhere", "./nowhere", "nowhere"])
def test_a_source_that_does_not_exist_is_named(folder, name, missing):
    sources = {"path": folder / "llm", "vision_tower": str(folder / "clip"), name: missing}
    with pytest.raises(MissingFileError, match=rf"The [\w ]+ {missing} does not exist: give a folder or a hub name"):
        load_checkpoint(**sources)


@pytest.mark.parametrize("name", ["path", "vision_tower", "projector", "lora"])
def test_a_hub_name_that_cannot_be_downloaded_is_named(folder, name, monkeypatch):
    sources = {"path": folder / "llm", "vision_tower": str(folder / "clip"), name: "owner/no such name"}
    with pytest.raises(UserError, match="owner/no such name is neither a folder nor on the hub: Repo id must use"):
        load_checkpoint(**sources)


def test_a_file_is_no_checkpoint(folder):
    with pytest.raises(UserError, match=r"config\.json is a file: give its folder"):
        load_checkpoint(folder / "llm" / "config.json")


def test_a_file_of_tensors_that_is_broken_is_named(folder, tmp_path):
    whole = (folder / "llm" / "model.safetensors").read_bytes()
    torch.save({"a": torch.ones(1000)}, tmp_path / "whole.bin")
    zipped = (tmp_path / "whole.bin").read_bytes()
    torch.save({"a": torch.ones(1000)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.bin").read_bytes()
    contents = {"model.safetensors": (b"", b"text", whole[:50], whole[:-1])}
    contents["pytorch_model.bin"] = (b"", b"hello", zipped[:500], old[:100], old[:-100], b"\0" + zipped[1:])
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("file", "text")
    contents["pytorch_model.bin"] += ((tmp_path / "other.zip").read_bytes(),)
    for name, broken in contents.items():
        model = tmp_path / name.split(".")[0]
        model.mkdir()
        for content in broken:
            (model / name).write_bytes(content)
            for read in (
                lambda model=model, name=name: read_tensors(model / name),
                lambda m=model: check_model_weights(m),
            ):
                with pytest.raises(
                    UserError, match=f"{model}(/{name})? (cannot be loaded: {name} is broken|is refused)"
                ):
                    read()


def test_a_tokenizer_or_tower_that_is_broken_is_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"clip holds no tokenizer that can be read: it has none of tokenizer\.json"):
        load_tokenizer(folder / "clip")
    whole = (word_tokenizer(tmp_path) / "tokenizer.json").read_text()
    for content in ("", "{}", whole[:100]):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(
            UserError, match=r"holds no tokenizer that can be read \(\w+: |tokenizer\.json is not valid JSON"
        ):
            load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision')
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        load_checkpoint(folder / "llm", vision_tower=str(tmp_path))
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        load_checkpoint(tmp_path)
