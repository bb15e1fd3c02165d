import json
import re
import socket
from unittest import mock

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava_skip import LlavaSkipForConditionalGeneration
from tests.support.conversations import byte_tokenizer
from tests.support.small_models import small_config, small_model
from train.arguments import ModelArguments
from train.recipe.model import build_model, check_weights, prepare
from train.run import check_output, parse
from train.train import main


@pytest.fixture
def tokenizer_folder(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_new_model_takes_its_ids_from_the_tokenizer(tokenizer_folder):
    config, processor = prepare(ModelArguments(tokenizer=tokenizer_folder, template="llama3", preset="sv-llava-64"))
    assert config.image_token_id == processor.image_token_id == 3
    assert (config.text_config.bos_token_id, config.text_config.pad_token_id) == (1, 0)
    assert config.skip == {"retained": 4, "skipped": 10, "forget_cache": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "sv-llava-7"}, "Unknown preset 'sv-llava-7'; known: llava, sv-llava-64"),
        ({"size": "giant"}, "Unknown size 'giant'"),
        ({"template": "v7"}, "Unknown conversation template 'v7'"),
        ({"template": None}, "has no chat template"),
        ({"model": "./nowhere"}, "./nowhere does not exist"),
    ],
)
def test_mistakes_show_before_a_model_is_made(tokenizer_folder, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(ModelArguments(**{"tokenizer": tokenizer_folder, "template": "v1", **arguments}))


def test_a_template_that_never_ends_shows_before_a_model_is_made(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    loop = "{% for a in range(99999) %}"
    tokenizer.chat_template = loop * 3 + "{% endfor %}" * 3
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr("llava_skip.foreign_templates.SECONDS", 0.1)
    with pytest.raises(ValueError, match="template does not end within 0.1 s; .*--template"):
        prepare(ModelArguments(tokenizer=str(tmp_path), template=None))


def test_a_model_that_is_nowhere_is_named(tokenizer_folder, monkeypatch, tmp_path):
    offline = mock.Mock(side_effect=OSError("We couldn't connect."))
    monkeypatch.setattr("llava_skip.checkpoints.files.snapshot_download", offline)
    with pytest.raises(ValueError, match=r"checkpoints/mine is neither a folder nor on the hub: We couldn't connect\."):
        prepare(ModelArguments(model="checkpoints/mine", tokenizer=tokenizer_folder, template="v1"))
    monkeypatch.setenv("LLAVA_SKIP_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="neither --model nor --tokenizer.* run llava-skip data"):
        prepare(ModelArguments(template="v1"))


def test_weights_are_looked_for_before_they_are_loaded(tmp_path):
    saved_model(tmp_path)
    check_weights(ModelArguments(model=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="The projector .*nowhere.bin does not exist"):
        check_weights(ModelArguments(model=str(tmp_path), projector="checkpoints/nowhere.bin"))
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    with pytest.raises(FileNotFoundError, match=r"no model weights .* merge .*convert base OUTPUT --lora"):
        check_weights(ModelArguments(model=str(tmp_path)))


def test_one_rank_speaks_and_another_only_if_it_alone_lives(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "--cache_dir", "x"])
    waited = mock.Mock()
    monkeypatch.setattr("time.sleep", waited)
    for rank, start in (("0", "error: --cache_dir"), ("1", f"error: rank 1 on {socket.gethostname()}: --cache_dir")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2 and capsys.readouterr().err.startswith(start)
        assert waited.called == (rank == "1")


def test_tokenizer_without_the_image_token(tmp_path):
    byte_tokenizer(["<pad>", "<s>", "</s>"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not know the image token '<image>'"):
        prepare(ModelArguments(tokenizer=str(tmp_path), template="v1"))


def test_unknown_parts_and_flags_are_refused():
    with pytest.raises(ValueError, match=r"unknown parts \['tower'\]"):
        ModelArguments(train_parts=["tower"])
    with pytest.raises(ValueError, match="--nonsense"):
        parse(["--data", "x", "--output_dir", "y", "--nonsense", "1"])
    with pytest.raises(ValueError, match="--data is missing"):
        parse(["--output_dir", "y"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size is 0; it must be above 0"),
        ("--num_train_epochs -1 --max_steps 3", "--num_train_epochs is -1.0; it must be above 0"),
        ("--num_train_epochs 0", "--num_train_epochs is 0.0; it must be above 0"),
        ("--learning_rate nan", "--learning_rate is nan; it must be above 0"),
        ("--learning_rate inf", "--learning_rate is inf; it must be above 0"),
        ("--max_grad_norm -1", "--max_grad_norm is -1.0; it must be 0 or more"),
        ("--shuffle_buffer 0", "--shuffle_buffer is 0; it must be above 0"),
        ("--lora_dropout -0.1", "--lora_dropout is -0.1; it must be 0 or more"),
        ("--enable_jit_checkpoint true", "--enable_jit_checkpoint of transformers is not supported"),
    ],
)
def test_numbers_that_make_no_run_are_refused(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(["--data", "x", "--output_dir", "y", "--use_cpu", "true", *words.split()])


def saved_model(folder, skip_of=None):
    config = small_config(skip_of, vocab_size=400)
    config.image_token_index = 3
    model = LlavaSkipForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    return model


def trained(model, prefix):
    return {parameter.requires_grad for name, parameter in model.named_parameters() if name.startswith(prefix)}


def test_a_dense_model_can_be_loaded_with_a_skipping_preset(tmp_path):
    dense = saved_model(tmp_path)
    arguments = ModelArguments(model=str(tmp_path), preset="sv-llava-100", template="v1")
    config, _ = prepare(arguments)
    model = build_model(arguments, config, torch.float32)
    assert config.skip == {"retained": 3, "skipped": 4, "forget_cache": True}  # 100 and 156 of 576, for 16 patches
    for name, tensor in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.model.summary.score.bias.item() == 0
    assert trained(model, "model.vision_tower") == {False}
    assert trained(model, "model.language_model") == trained(model, "lm_head") == {True}
    assert trained(model, "model.summary") == trained(model, "model.multi_modal_projector") == {True}


def test_trainable_parts_are_an_argument(tmp_path):
    saved_model(tmp_path)
    arguments = ModelArguments(
        model=str(tmp_path), preset="sv-llava-100", template="v1", train_parts=["multi_modal_projector", "summary"]
    )
    model = build_model(arguments, prepare(arguments)[0], torch.float32)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(("projector" in name or "summary" in name) for name in trainable)


def test_a_checkpoint_of_another_program_is_to_be_converted_first(tmp_path, tokenizer_folder):
    (tmp_path / "config.json").write_text('{"model_type": "llava", "mm_vision_tower": "clip", "hidden_size": 64}')
    with pytest.raises(ValueError, match="layout 'original LLaVA'. Convert it first.*llava-skip convert"):
        prepare(ModelArguments(model=str(tmp_path), tokenizer=tokenizer_folder, template="v1"))


def test_a_language_model_and_a_tower_are_joined(tmp_path):
    language = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    language.save_pretrained(tmp_path / "llm")
    byte_tokenizer(["<pad>", "<s>", "</s>"]).save_pretrained(tmp_path / "llm")
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
    )
    tower.save_pretrained(tmp_path / "clip")
    arguments = ModelArguments(model=str(tmp_path / "llm"), vision_tower=str(tmp_path / "clip"), template="v1")
    config, processor = prepare(arguments)
    model = build_model(arguments, config, torch.float32)
    assert config.text_config.vocab_size % 64 == 0 and config.text_config.vocab_size > 300
    assert processor.image_token_id == config.image_token_id == 259
    ours, theirs = model.state_dict(), language.state_dict()
    assert torch.equal(ours["model.language_model.embed_tokens.weight"][:300], theirs["model.embed_tokens.weight"])
    name = "layers.1.mlp.down_proj.weight"
    assert torch.equal(ours[f"model.language_model.{name}"], theirs[f"model.{name}"])
    for name, tensor in tower.state_dict().items():
        assert torch.equal(ours[f"model.vision_tower.{name}"], tensor), name


def test_a_plain_language_model_needs_a_tower_and_a_tokenizer(tmp_path):
    small_model().model.language_model.config.save_pretrained(tmp_path)
    CLIPVisionConfig().save_pretrained(tmp_path / "clip")
    model, tower = str(tmp_path), str(tmp_path / "clip")
    with pytest.raises(ValueError, match=f"{model} holds no tokenizer that can be read"):
        prepare(ModelArguments(model=model, vision_tower=tower, template="v1"))
    byte_tokenizer(["<pad>", "<s>", "</s>"]).save_pretrained(tmp_path)  # without the image token, which a tower brings
    with pytest.raises(ValueError, match="is a llama model.*--vision_tower"):
        prepare(ModelArguments(model=model, template="v1"))
    with pytest.raises(ValueError, match="The vision tower .* is a llama model: give a CLIP tower"):
        prepare(ModelArguments(model=model, vision_tower=model, template="v1"))


def run_record(folder, learning_rate):
    return {
        "model": {"model": None},
        "data": {"data": "d"},
        "training": {"learning_rate": learning_rate, "save_steps": 1},
    }


def test_output_folders(tmp_path):
    check_output(tmp_path / "new", run_record(tmp_path, 1), overwrite=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        check_output(tmp_path / "file", run_record(tmp_path, 1), overwrite=False)
    with pytest.raises(ValueError, match="holds other files"):
        check_output(tmp_path, run_record(tmp_path, 1), overwrite=False)
    check_output(tmp_path, run_record(tmp_path, 1), overwrite=True)
    (tmp_path / "run.json").write_text(json.dumps(run_record(tmp_path, 1)))
    same = run_record(tmp_path, 1)
    same["training"]["save_steps"] = 7  # how often it is saved does not make it another run
    check_output(tmp_path, same, overwrite=False)
    with pytest.raises(ValueError, match=r"holds another run \(training.learning_rate was 1 and is 2\)"):
        check_output(tmp_path, run_record(tmp_path, 2), overwrite=False)
