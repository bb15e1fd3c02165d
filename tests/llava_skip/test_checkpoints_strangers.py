"""Checkpoints as strangers leave them: git-lfs pointers, names of other families, values that cannot be meant."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import llava_skip.checkpoints.loading as loading
from eval.answering.generate import Generator, numerics
from eval.answering.models import check_model
from llava_skip import LlavaSkipForConditionalGeneration
from llava_skip.checkpoints import load_checkpoint, load_config, load_tokenizer
from llava_skip.checkpoints.adapters import find_projector, read_projector
from llava_skip.checkpoints.files import check_tensors, find_model_weights, read_tensors
from llava_skip.checkpoints.loading import check_native
from llava_skip.checkpoints.report import LoadReport
from llava_skip.convert import convert
from llava_skip_base.console import make_app
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json, write_json
from tests.llava_skip.test_checkpoints_layouts import write
from tests.support.small_models import small_config
from tests.support.stand_ins import language_model, vision_tower, word_tokenizer
from train.arguments import ModelArguments
from train.merge_lora import load_base
from train.recipe.model import check_weights, prepare

CASES = Path(__file__).parents[1] / "cases" / "ckpt"
POINTER = (CASES / "pointer").read_bytes()


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A tower, and weights under LLaVA's names that fit the cases' configurations."""
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**read_json(CASES / "tower.json"))).save_pretrained(folder / "tower")
    text = {k: v for k, v in read_json(CASES / "sharegpt4v.json").items() if not k.startswith(("mm_", "model_type"))}
    weights = LlamaForCausalLM(LlamaConfig(**text)).state_dict()
    for name, shape in (("0.weight", (32, 64)), ("0.bias", (32,)), ("2.weight", (32, 32)), ("2.bias", (32,))):
        weights[f"model.mm_projector.{name}"] = torch.randn(shape)
    language_model(folder / "llm", word_tokenizer(folder / "words"))
    vision_tower(folder / "clip")
    return folder, weights


def stranger(family, folder, case, **more):
    write(folder, read_json(CASES / f"{case}.json") | more, family[1])
    shutil.copytree(family[0] / "tower", folder / "tower")
    return folder


# ------------------------------------------------------------------------------------------------ git-lfs


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("llm", "model.safetensors"), ("llm", "config.json"), ("llm", "tokenizer.json"), ("llm", "tokenizer.model"),
        ("llm", "tokenizer_config.json"), ("clip", "model.safetensors"), ("clip", "config.json"),
        ("mlp", "mm_projector.bin"), ("llm", "model.safetensors.index.json"),
    ],
)  # fmt: skip
def test_a_pointer_of_git_lfs_is_named(family, tmp_path, source, name):
    for part in ("llm", "clip"):
        shutil.copytree(family[0] / part, tmp_path / part)
    write(tmp_path / "mlp", {}, {k: v for k, v in family[1].items() if "mm_projector" in k}, "mm_projector.bin")
    (tmp_path / "mlp" / "config.json").unlink()
    (tmp_path / source / name).write_bytes(POINTER)
    words = [str(tmp_path / "llm"), str(tmp_path / "out"), "--vision-tower", str(tmp_path / "clip")]
    result = CliRunner().invoke(make_app(convert), [*words, "--projector", str(tmp_path / "mlp")])
    assert result.exit_code == 2
    assert (
        f"error: {tmp_path / source / name} is a git-lfs pointer" in result.stderr and "git lfs pull" in result.stderr
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "adapter_model.bin", "mm_projector.bin"])
def test_every_reader_of_tensors_names_a_pointer(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    for read in (read_tensors, check_tensors, lambda path: read_projector(find_projector(path), LoadReport(""))):
        with pytest.raises(UserError, match=f"{name} is a git-lfs pointer, not the file itself: run git lfs pull in"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "processor_config.json", "chat_template.jinja"]
)
def test_an_evaluation_names_a_pointer_before_it_loads_anything(saved, tmp_path, name):
    folder = shutil.copytree(saved, tmp_path / "cloned")
    (folder / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a git-lfs pointer"):
        check_model(folder)


def test_a_sentencepiece_model_that_is_broken_is_named(tmp_path):
    for content in (b"", b"text", b"\x00" * 100):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match="holds no tokenizer that can be read"):
            load_tokenizer(tmp_path)


# ------------------------------------------------------------------------------------------------ other families


def test_another_family_is_read_if_its_language_model_is_named(family, tmp_path):
    folder = stranger(family, tmp_path / "share4v", "sharegpt4v")
    with pytest.raises(UserError, match=r"unknown type 'share4v' .*Share4VLlamaForCausalLM.* --language-model-type"):
        load_checkpoint(folder)
    words = [str(folder), str(tmp_path / "out"), "--language-model-type", "llama"]
    assert CliRunner().invoke(make_app(convert), words).exit_code == 0
    model = load_checkpoint(tmp_path / "out")
    assert model.config.text_config.model_type == "llama"
    assert torch.equal(model.model.multi_modal_projector.linear_1.bias, family[1]["model.mm_projector.0.bias"])
    with pytest.raises(UserError, match=r"unknown type 't5' .*one of llama, mistral, qwen2, qwen3"):
        load_checkpoint(folder, language_model_type="t5")


@pytest.mark.parametrize(
    ("kind", "class_name"),
    [("mgm", "MGMLlamaForCausalLM"), ("bunny-llama", "BunnyLlamaForCausalLM"), ("moe_llava_llama", "MoELLaVA")],
)
def test_families_by_their_names(family, tmp_path, kind, class_name):
    folder = stranger(family, tmp_path / "model", "sharegpt4v", model_type=kind, architectures=[class_name])
    with pytest.raises(UserError, match=f"unknown type '{kind}'.*--language-model-type"):
        load_checkpoint(folder)
    assert load_checkpoint(folder, language_model_type="llama", log=False).config.text_config.model_type == "llama"


def test_what_another_family_has_besides_is_refused_by_name(family, tmp_path):
    more = {"mm_vision_tower": None, "mm_vision_tower_aux_list": ["a", "b"], "model_type": "cambrian_llama"}
    folder = stranger(family, tmp_path / "cambrian", "sharegpt4v", **more, mm_projector_type="sva")
    with pytest.raises(UserError, match="mm_projector_type is 'sva'; the model has mlp2x_gelu"):
        load_checkpoint(folder, language_model_type="llama")


def test_the_base_says_what_it_is_whatever_the_family_of_its_projector(family, tmp_path):
    projector = {name: tensor for name, tensor in family[1].items() if "mm_projector" in name}
    settings = read_json(CASES / "sharegpt4v.json") | {"mm_vision_tower": str(family[0] / "tower")}
    write(tmp_path / "projector", settings, projector, "mm_projector.bin")
    config, _ = load_config(family[0] / "llm", projector=tmp_path / "projector")
    assert config.text_config.model_type == "llama" and config.vision_config.hidden_size == 64


@pytest.mark.parametrize(("towers", "fits"), [(["tower"], True), (["tower", "clip"], False), ([], False), (3, False)])
def test_a_list_of_towers_may_have_one(family, tmp_path, towers, fits):
    folder = stranger(family, tmp_path / "model", "tower_list", mm_vision_tower=towers)
    if fits:
        assert load_checkpoint(folder, log=False).config.vision_config.hidden_size == 64
        return
    message = r"mm_vision_tower is .*; the model has one CLIP tower" if towers else "without a vision tower"
    with pytest.raises(UserError, match=message):
        load_checkpoint(folder)


def test_a_configuration_is_an_object(family, tmp_path):
    for content in ("", "[]", "3", "null", '"llama"', "{}", "[" * 200_000):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json (is|\()"):
            load_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------ what does not fit


def changed(saved, folder, **values):
    """A copy of a saved model whose config.json says something else; `text_config__x` is the field x of text_config."""
    shutil.copytree(saved, folder)
    raw = read_json(folder / "config.json")
    for name, value in values.items():
        *path, last = name.split("__")
        part = raw
        for step in path:
            part = part[step]
        part[last] = value
    write_json(folder / "config.json", raw)
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_config__hidden_size": 96}, r"does not fit the model of its config.json.* Shape: \["),
        ({"text_config__num_hidden_layers": 9}, r"does not fit the model of its config.json. Missing: \["),
        ({"text_config__num_hidden_layers": 1}, r"does not fit the model of its config.json.* Unknown: \["),
        ({"text_config__hidden_size": -8}, "text_config of .* has hidden_size -8; it must be a whole number from 1 to"),
        ({"text_config__num_hidden_layers": 10**9}, "num_hidden_layers 1000000000; it must be a whole number from 1"),
        ({"text_config__vocab_size": 100}, r"(pad_token_id|image_token_index) is \d+, but vocab_size is 100"),
        ({"text_config__pad_token_id": 5000}, r"pad_token_id is 5000, but vocab_size is \d+"),
        ({"image_token_index": -200}, "image_token_index is -200, but vocab_size is"),
        ({"front_end": "nowhere"}, "front_end is 'nowhere'; known: llava, hd, cos"),
        ({"front_end": ["llava"]}, r"front_end \['llava'\]; it must be the name of a front end"),
        ({"text_config": []}, r"text_config of .* is \[\]; it must be an object"),
        ({"text_config__model_type": "nobody"}, "text_config .* is of the unknown type 'nobody'"),
        ({"text_config__hidden_act": "x"}, "has hidden_act x?'?x?'?; it must be one of"),
        ({"vision_config__patch_size": 400}, "patch_size 400; it must be at most image_size"),
        ({"vision_config__model_type": "siglip"}, "is a siglip model: give a CLIP tower"),
        ({"dtype": "float99"}, "dtype 'float99'; it must be the name of a number format"),
        ({"text_config__rms_norm_eps": "x"}, "holds no configuration of a llama model: .*rms_norm_eps"),
        ({"skip": 3}, "skip 3; it must be an object of numbers"),
        ({"skip__skipped": 10**30}, r"skip.skipped is 10+; it must be a whole number from 1 to"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named_before_weights_load(saved, tmp_path, values, message, monkeypatch):
    folder = changed(saved, tmp_path / "changed", **values)
    monkeypatch.setattr(loading, "_build", None)
    monkeypatch.setattr(LlavaSkipForConditionalGeneration, "from_pretrained", None)
    for read in (load_checkpoint, check_native, lambda path: Generator(check_model(path), numerics())):
        with pytest.raises(UserError, match=message):
            read(folder)
    with pytest.raises(UserError, match=message):
        run = ModelArguments(model=str(folder))
        check_weights(run, prepare(run)[0])


def test_an_adapter_is_not_merged_into_another_base(saved, tmp_path):
    config = small_config()
    LlavaSkipForConditionalGeneration(config).save_pretrained(tmp_path / "other")
    config.save_pretrained(tmp_path / "adapter")
    write_json(tmp_path / "adapter" / "adapter_config.json", {"peft_type": "LORA"})
    run = {"model": {"model": str(tmp_path / "other")}, "training": {"bf16": False, "fp16": False, "seed": 1}}
    write_json(tmp_path / "adapter" / "run.json", run)
    assert load_base(tmp_path / "adapter", None, None).config.text_config.hidden_size == 32
    with pytest.raises(UserError, match=f"{saved} .* does not fit the model of its config.json"):
        load_base(tmp_path / "adapter", str(saved), None)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "names no shards"),
        ({}, "names no shards"),
        ({"weight_map": {"a": 3}}, "names no shards"),
        ({"weight_map": {"a": "../llm/model.safetensors"}}, "names files that are not in its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names files that are not in its folder"),
        ({"weight_map": {"a": "model.bin"}}, "names files of another kind"),
        ({"weight_map": {"a": "model-1.safetensors"}}, r"lacks the shards \['model-1.safetensors'\]"),
    ],
)
def test_an_index_names_files_of_its_own_folder(tmp_path, index, message):
    write_json(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(UserError, match=message):
        find_model_weights(tmp_path)
