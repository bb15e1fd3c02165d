"""The model of a run from its sources: wherever they are, and with one message for what is wrong with them."""

import shutil

import pytest
import torch

from llava_skip.checkpoints import load_tokenizer
from llava_skip_base.errors import UserError
from tests.support.stand_ins import language_model, vision_tower, word_tokenizer
from train.arguments import ModelArguments
from train.recipe.model import build_model, check_weights, prepare


@pytest.fixture
def folder(tmp_path, monkeypatch):
    language_model(tmp_path / "llm", word_tokenizer(tmp_path / "words"))
    vision_tower(tmp_path / "clip")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def saved(folder):
    """A saved model with its tokenizer."""
    arguments = ModelArguments(model="~/llm", vision_tower="~/clip", template="v1")
    config, processor = prepare(arguments)
    model = build_model(arguments, config, torch.float32)
    model.save_pretrained(folder / "saved")
    processor.tokenizer.save_pretrained(folder / "saved")
    weights = model.model.multi_modal_projector.state_dict()
    names = {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"}
    torch.save(
        {names[key.split(".")[0]] + f".{key.split('.')[1]}": 2 * tensor for key, tensor in weights.items()},
        folder / "mm_projector.bin",
    )
    return model


def build(**options):
    arguments = ModelArguments(template="v1", **options)
    config, _ = prepare(arguments)
    check_weights(arguments)
    return build_model(arguments, config, torch.float32)


def test_the_users_folder_is_expanded(saved, folder):
    for projector, factor in ((None, 1), ("~/mm_projector.bin", 2)):
        model = build(model="~/saved", tokenizer="~/saved", projector=projector)
        for name, tensor in saved.model.multi_modal_projector.state_dict().items():
            assert torch.equal(model.model.multi_modal_projector.state_dict()[name], factor * tensor), name
    load_tokenizer("~/words", add_image_token=True).save_pretrained(folder / "image-words")
    assert build(tokenizer="~/image-words").config.image_token_id == 100


def test_a_join_takes_another_tokenizer(folder):
    word_tokenizer(folder / "more", 130)
    model = build(model="~/llm", vision_tower="~/clip", tokenizer="~/more")
    assert model.config.image_token_id == 130 and model.config.text_config.vocab_size == 192


def test_attention_is_chosen_and_checked_before_weights_load(saved, folder):
    for options in ({"tokenizer": "~/saved"}, {"model": "~/saved"}, {"model": "~/llm", "vision_tower": "~/clip"}):
        model = build(attn_implementation="eager", **options)
        inputs = {"input_ids": torch.arange(3, 9)[None], "output_attentions": True}
        assert model(**inputs).attentions[0] is not None  # sdpa gives none
        for name, message in (("fast", "not supported"), ("flash_attention_2", "installed")):
            with pytest.raises(UserError, match=f"--attn_implementation {name} cannot be used: .*{message}"):
                prepare(ModelArguments(template="v1", attn_implementation=name, **options))


def test_weights_that_are_broken_are_named(saved, folder):
    file = folder / "saved" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"saved cannot be loaded: model\.safetensors is broken"):
        build(model="~/saved")
    arguments = ModelArguments(model="~/saved", template="v1")
    with pytest.raises(UserError, match="saved cannot be loaded: "):
        build_model(arguments, prepare(arguments)[0], torch.float32)
    file.unlink()
    with pytest.raises(UserError, match="saved cannot be loaded: "):
        build_model(arguments, prepare(arguments)[0], torch.float32)
    shutil.rmtree(folder / "saved")
    with pytest.raises(UserError, match="The model ~/saved does not exist"):
        build(model="~/saved")
