"""Training with a rival method instead of skipping."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import llava_skip  # noqa: F401  (registers the Auto classes)
from llava_skip_base.errors import UserError
from playground.data.build import ensure_built
from tests.support.runs import train
from train.arguments import ModelArguments
from train.recipe.model import prepare


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return ensure_built(tmp_path_factory.mktemp("digits") / "digits", train_images=16)


def test_a_step_with_a_rival_leaves_a_model_that_has_it(digits, tmp_path):
    data = ["--data", str(digits / "train.json"), "--images", str(digits / "images"), "--max_steps", "1"]
    new = ["--tokenizer", str(digits / "tokenizer"), "--template", "v1", "--per_device_train_batch_size", "4"]
    result = train(tmp_path / "first", *data, *new, "--reduction", "visionzip:12")
    assert result["reduction"] == {"method": "visionzip", "tokens": 12} and result["preset"] == "llava"
    assert result["skip"] is None and result["skipped_ffn_share"] == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "first")
    processor = AutoProcessor.from_pretrained(tmp_path / "first")
    image = next((digits / "images").rglob("*.png"))
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": "How many digits?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 12
    with torch.no_grad():
        assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    # A saved model keeps its rival, takes another one, and refuses one that does not fit.
    for asked, entry in ((None, {"method": "visionzip", "tokens": 12}), ("grid:9", {"method": "grid", "tokens": 9})):
        config, processor = prepare(ModelArguments(model=str(tmp_path / "first"), reduction=asked))
        assert config.reduction == entry and processor.image_seq_length == entry["tokens"]
    with pytest.raises(UserError, match="keeps 99 tokens, but the image has 36"):
        prepare(ModelArguments(model=str(tmp_path / "first"), reduction="grid:99"))


def test_a_mistake_in_the_rival_is_found_with_the_arguments(digits):
    with pytest.raises(UserError, match="the method is 'visionzap'; known: random"):
        ModelArguments(reduction="visionzap:12")
    arguments = {"tokenizer": str(digits / "tokenizer"), "template": "v1", "reduction": "grid:9"}
    with pytest.raises(UserError, match="skip and reduction grid:9 are both set"):
        prepare(ModelArguments(preset="sv-llava-256", **arguments))
    config, _ = prepare(ModelArguments(**arguments))
    assert config.preset == "llava"
