"""Recipes: each one that comes with the project resolves, flags override it, and a mistake in one is one message."""

import json
import re
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

from llava_skip import LlavaSkipForConditionalGeneration, LlavaSkipProcessor, preset_config
from llava_skip.checkpoints import load_tokenizer, padded_vocabulary
from llava_skip.processing import find_image_token
from playground.data.build import ensure_built
from tests.support.stand_ins import language_model, vision_tower
from train.arguments import KINDS, DataArguments, ModelArguments
from train.command_line import read_command_line, with_recipe
from train.recipe.recipes import FOLDER, recipe_names, zero_file
from train.run import parse
from train.train import main

CPU = ("--use_cpu", "true", "--deepspeed", "")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Small files for the models and data that recipes name."""
    folder = tmp_path_factory.mktemp("stand_ins")
    digits = ensure_built(folder / "digits", train_images=8)
    tokenizer = load_tokenizer(digits / "tokenizer")
    for preset in ("sv-llava-256", "sv-cos", "llava", "cos"):
        config = preset_config(preset, vocab_size=padded_vocabulary(len(tokenizer)))
        config.image_token_index = find_image_token(tokenizer)
        LlavaSkipForConditionalGeneration(config).save_pretrained(folder / preset)
        LlavaSkipProcessor.for_config(config, tokenizer, "v1").save_pretrained(folder / preset)
    sizes = {"0.weight": (32, 16), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    torch.save({f"model.mm_projector.{n}": torch.zeros(s) for n, s in sizes.items()}, folder / "mm_projector.bin")
    return {
        "checkpoints/pretrain": folder / "sv-llava-256",
        "checkpoints/joined": folder / "sv-llava-256",
        "checkpoints/pretrain-cos": folder / "sv-cos",
        "checkpoints/sv-llava-256": folder / "sv-llava-256",
        "checkpoints/smollm2": folder / "llm",
        "checkpoints/embedded-smollm2-align": folder / "sv-llava-256",
        "lmsys/vicuna-7b-v1.5": language_model(folder / "llm", digits / "tokenizer"),
        "openai/clip-vit-large-patch14-336": vision_tower(folder / "clip", layers=24),
        "checkpoints/table1-pretrain": folder / "llava",
        "checkpoints/table2-pretrain": folder / "llava",
        "checkpoints/table1-pretrain-cos": folder / "cos",
        "unsloth/llama-3-8b-Instruct": folder / "llm",
        "sv-1m.yaml": digits / "train.json",
        "sv-9m.yaml": digits / "train.json",
        "mm_projector.bin": folder / "mm_projector.bin",
        "blip_laion_cc_sbu_558k.json": digits / "captions.json",
        "llava_v1_5_mix665k.json": digits / "train.json",
        "images": digits / "images",
        "playground/data": digits / "images",
        "home": folder,
        "tokenizer": digits / "tokenizer",
    }


@pytest.fixture
def elsewhere(stand_ins, tmp_path, monkeypatch):
    """Another folder than the checkout; the embedded set of the stand-ins is the embedded set."""
    home = tmp_path / "home"
    (home / "playground" / "data").mkdir(parents=True)
    (home / "playground" / "data" / "digits").symlink_to(stand_ins["home"] / "digits")
    monkeypatch.setenv("LLAVA_SKIP_HOME", str(home))
    monkeypatch.setattr("playground.data.build.ensure_built", lambda: home / "playground" / "data" / "digits")
    monkeypatch.setattr("playground.smollm2.ensure_smollm2", lambda: home / "checkpoints" / "smollm2")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    return home


PAPER = [name for name in recipe_names() if name.startswith("table")]
FAST = ("table1-sv-llava-hd", "table1-sv-cos", "table2-visionzip")
"""Recipes of the paper's tables that are resolved in each test run; all of them are in the slow ones."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in PAPER and name not in FAST else ())
        for name in recipe_names()
    ],
)
def test_every_recipe_resolves(name, elsewhere, stand_ins, monkeypatch, capsys):
    recipe = ["--recipe", name, *CPU]
    if name in ("finetune", "pretrain"):  # what these share has no model and no data
        recipe += ["--model", "lmsys/vicuna-7b-v1.5", "--vision_tower", "openai/clip-vit-large-patch14-336"]
        recipe += ["--data", "llava_v1_5_mix665k.json", "--images", "playground/data", "--template", "v1"]
    model, data, run = parse(recipe)
    assert run.output_dir.startswith(str(elsewhere / "checkpoints"))
    for group in (model, data):
        for key in ("model", "vision_tower", "projector", "data", "images"):
            value = str(getattr(group, key, None) or "").replace(f"{elsewhere}/", "")
            if value in stand_ins:
                recipe += [f"--{key}", str(stand_ins[value])]
    if model.reduction:  # the stand-in has 36 patches
        recipe += ["--reduction", re.sub(r":.*", ":16", model.reduction)]
    found = SimpleNamespace(util=SimpleNamespace(find_spec=bool))  # bitsandbytes, of which a dry run needs no more
    monkeypatch.setattr("train.recipe.lora.importlib", found)
    monkeypatch.setattr("sys.argv", ["train", *recipe, "--dry_run", "true"])
    with pytest.raises(SystemExit, match="0"):
        main()
    shown = capsys.readouterr().out
    resolved = json.loads(shown[shown.index("\n{") :])
    assert resolved["model"]["preset"] == model.preset
    assert resolved["training"]["output_dir"] == run.output_dir
    assert not (elsewhere / "checkpoints").exists()


@pytest.mark.parametrize(
    ("name", "processes", "batch", "accumulated", "rate", "zero"),
    [
        ("embedded", 1, 16, 1, 8e-4, "zero2"),
        ("embedded", 2, 8, 1, 8e-4, "zero2"),
        ("embedded", 32, 1, 1, 8e-4, "zero2"),
        ("pretrain-558k", 8, 32, 1, 1e-3, "zero2"),
        ("pretrain-558k", 1, 32, 8, 1e-3, "zero2"),
        ("finetune-665k", 8, 16, 1, 2e-5, "zero3"),
        ("finetune-665k", 32, 4, 1, 2e-5, "zero3"),
        ("finetune-665k", 3, 14, 3, 2e-5, "zero3"),  # 126 samples a step
        ("finetune-665k-hd", 8, 4, 4, 2e-5, "zero3"),
        ("finetune-665k-cos", 8, 8, 2, 2e-5, "zero3"),
        ("lora", 1, 4, 32, 2e-4, "zero2"),
        ("qlora", 1, 4, 32, 2e-4, "zero2"),
    ],
)
def test_recipes_have_the_numbers_of_llava(elsewhere, name, processes, batch, accumulated, rate, zero):
    known = [entry.name for kind in KINDS for entry in fields(kind)]
    words = with_recipe(["--recipe", name], known, processes)
    assert words[words.index("--deepspeed") + 1] == zero
    model, data, run = parse([*words, *CPU])
    assert (run.per_device_train_batch_size, run.gradient_accumulation_steps) == (batch, accumulated)
    assert (run.learning_rate, run.num_train_epochs, data.max_length) == (rate, 1, 2048)
    assert (run.warmup_steps, run.lr_scheduler_type, run.weight_decay) == (0.03, "cosine", 0)
    assert (model.lora_r, model.lora_alpha) == ((128, 256) if model.lora_enable else (64, 16))
    assert run.part_rates == ({"multi_modal_projector": 2e-5} if model.lora_enable else {})


def test_the_zero_settings_go_by_name_or_path(tmp_path, monkeypatch):
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == ["zero2", "zero2_offload", "zero3", "zero3_offload"]
    assert json.loads((FOLDER / "zero3.json").read_text())["zero_optimization"]["stage"] == 3
    monkeypatch.chdir(tmp_path)
    assert zero_file("zero2") == str(FOLDER / "zero2.json")
    assert zero_file("own/zero2.json") == "own/zero2.json"


def test_flags_override_a_recipe(elsewhere, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: finetune-665k\nlearning_rate: 1.0e-5\ntrain_parts: [summary]\n")
    words = ["--recipe", str(recipe), *CPU]
    model, data, run = parse(words)
    assert (run.learning_rate, model.train_parts, model.template) == (1e-5, ["summary"], "v1")
    model, data, run = parse(
        [*words, "--learning-rate=3e-5", "--model_name_or_path", "mine", "--data_path", "own.json"]
    )
    assert (run.learning_rate, model.model, data.data, data.images) == (3e-5, "mine", "own.json", "")
    assert parse([*words, "--gradient_accumulation_steps", "2"])[2].per_device_train_batch_size == 16
    assert parse([*words, "--per_device_train_batch_size", "2"])[2].gradient_accumulation_steps == 1


def test_rows_of_a_fixed_number_of_tokens_are_no_samples_of_a_step(elsewhere, tmp_path):
    recipe = tmp_path / "mine.yaml"
    packed = "padding_free: true\nmax_tokens_per_batch: 4096\nper_device_train_batch_size: 1\n"
    recipe.write_text(f"base: finetune-665k\n{packed}")
    run = parse(["--recipe", str(recipe), *CPU])[2]
    assert (run.per_device_train_batch_size, run.gradient_accumulation_steps) == (1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "has the unknown key 'learning_rat'. Did you mean learning_rate?"),
        ("zzz: 1", "has the unknown key 'zzz'."),
        ("- a\n- b", "holds no recipe: it must map arguments to values."),
        ("a: [", "is not valid YAML"),
        ("samples_per_step: many", "samples_per_step 'many'; it must be a number above 0."),
        ("base: nowhere", "There is no recipe 'nowhere': give a YAML file, or one of embedded, "),
    ],
)
def test_a_mistake_in_a_recipe_is_named(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(["--recipe", str(tmp_path / "mine.yaml")])


def test_a_recipe_needs_a_name_that_exists():
    with pytest.raises(ValueError, match="There is no recipe 'embeded'"):
        parse(["--recipe", "embeded"])
    with pytest.raises(ValueError, match="--recipe needs a value"):
        parse(["--recipe"])


def test_recipes_based_on_each_other_are_refused(tmp_path):
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {tmp_path / base}.yaml\n")
    with pytest.raises(ValueError, match=r"The recipe .*a.yaml is based on itself"):
        parse(["--recipe", str(tmp_path / "a.yaml")])


def test_flags_of_llava_override_a_recipe(elsewhere):
    run = parse(["--recipe", "lora", "--mm_projector_lr", "1e-5", *CPU])[2]
    assert run.part_rates == {"multi_modal_projector": 1e-5}
    model = parse(["--recipe", "pretrain-558k", "--freeze_mm_mlp_adapter", "true", *CPU])[0]
    assert model.train_parts == ["summary", "language_model"]


@pytest.mark.parametrize("name", recipe_names())
def test_other_programs_take_what_they_know_of_a_recipe(elsewhere, name):
    model, data = read_command_line((ModelArguments, DataArguments), ["--recipe", name, "--data", "own.json"])
    assert data.data == "own.json" and model.lora_enable == (name in ("lora", "qlora", "embedded-smollm2"))
