"""Checkpoints and rivals: a llava-hf model converted with one, what is refused, which weights a rival needs."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from llava_skip import LlavaSkipProcessor
from llava_skip.checkpoints import export_llava_hf, load_checkpoint
from llava_skip.convert import convert
from llava_skip.reduction import ReductionConfig
from llava_skip_base.console import make_app
from llava_skip_base.errors import UserError
from tests.support.conversations import byte_tokenizer
from tests.support.small_models import small_model


@pytest.fixture(scope="module")
def model():
    made = small_model(None, vocab_size=400)
    made.config.image_token_index = 3
    return made


@pytest.fixture
def theirs(model, tmp_path):
    """The folder of a llava-hf model with its processor."""
    processor = LlavaSkipProcessor.for_config(model.config, byte_tokenizer(), "v1")
    export_llava_hf(model, tmp_path / "hf", processor)
    return tmp_path / "hf"


def run(*arguments):
    return CliRunner().invoke(make_app(convert), [str(argument) for argument in arguments])


def test_a_llava_hf_checkpoint_is_converted_with_a_rival(model, theirs, tmp_path):
    result = run(theirs, tmp_path / "out", "--reduction", "visionzip:6", "--template", "v1")
    assert result.exit_code == 0, result.output
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert str(loaded.config.reduction_config) == "visionzip:6"
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_seq_length == 6
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = loaded.model.encode_images(pixels)
        model.set_reduction(ReductionConfig.parse("visionzip:6"))
        expected = model.model.encode_images(pixels)
        model.set_reduction(None)
    torch.testing.assert_close(found, expected)


def test_a_mistake_is_found_before_the_checkpoint_is_read(tmp_path):
    result = run("./nowhere", tmp_path / "out", "--reduction", "visionzap:6")
    assert result.exit_code == 2 and "the method is 'visionzap'; known: random" in result.stderr


def test_transformers_layout_is_refused(model, theirs, tmp_path):
    result = run(theirs, tmp_path / "out", "--reduction", "grid:4", "--to", "llava-hf")
    assert result.exit_code == 2 and "the reduction grid:4, which transformers' LLaVA does not know" in result.stderr


def test_a_rival_that_reads_the_last_layer_of_the_tower_needs_its_weights(theirs):
    file = theirs / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if ".encoder.layers.2." not in name}, file)
    assert load_checkpoint(theirs, reduction=ReductionConfig.parse("visionzip:6"), log=False).load_report.fresh
    with pytest.raises(UserError, match=r"Missing: \['model.vision_tower.encoder.layers.2"):
        load_checkpoint(theirs, reduction=ReductionConfig.parse("prumerge+:6"))
