"""LLaVA-HD's images and their image tokens."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from llava_skip import LlavaSkipProcessor
from llava_skip.vision.resampler import ResamplerConfig, cut_windows
from llava_skip.vision.tiling import TilingImageProcessorPil, choose_grid, cut_tiles
from tests.support.conversations import byte_tokenizer
from tests.support.small_models import small_config


def test_the_larger_grid_wins_a_tie_only_for_a_large_image():
    assert choose_grid(336, 336, most=4, side=336) == (1, 1)
    assert choose_grid(672, 672, most=4, side=336) == (2, 2)
    assert choose_grid(150, 200, most=4, side=336) == (1, 1)  # method, section 1 B
    assert choose_grid(300, 400, most=4, side=336) == (1, 2)
    assert choose_grid(480, 640, most=4, side=336) == (2, 2)


def test_tiles_come_row_by_row_after_the_thumbnail():
    image = Image.fromarray(np.kron(np.arange(4, dtype=np.uint8).reshape(2, 2) * 60, np.ones((8, 8), np.uint8)))
    crops = cut_tiles(image.convert("RGB"), most=4, side=8)
    assert len(crops) == 5 and all(crop.size == (8, 8) for crop in crops)
    assert [np.asarray(crop)[4, 4, 0] for crop in crops[1:]] == [0, 60, 120, 180]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("architecture", ["llava-hd", "sv-llava-hd"])
def test_processor_writes_the_image_tokens_that_the_model_fills(architecture, padded, tmp_path):
    config = small_config(architecture=architecture)
    config.pad_pictures = padded
    tokenizer = byte_tokenizer()
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    LlavaSkipProcessor.for_config(config, tokenizer, "v1").save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor.image_processor, TilingImageProcessorPil)
    images = [Image.new("L", (90, 30)), Image.new("RGB", (20, 20), "red")]
    inputs = processor(images=images, text=["<image>a", "b<image>"], padding=True, return_tensors="pt")
    crops = inputs["crop_counts"].tolist()
    assert crops == ([5, 5] if padded else [4, 2])
    lengths = (inputs["input_ids"] == config.image_token_id).sum(dim=1).tolist()
    assert lengths == [config.image_length(count) for count in crops]
    assert inputs["pixel_values"].shape == (sum(crops), 3, 16, 16)


def test_windows_are_cut_row_by_row():
    features = torch.arange(16.0).reshape(1, 16, 1)
    windows = cut_windows(features, 2)[0, :, :, 0]
    assert windows.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"windows": [3]}, "windows of 3 with 4 queries do not fit 4 x 4 features"),
        ({"queries": [3], "windows": [2]}, "windows of 2 with 3 queries do not fit"),
        ({"levels": [3]}, "name layers that a tower of 3 does not have"),
        ({"windows": [4, 2]}, "has 2 scales and resampler.queries 1"),
    ],
)
def test_a_resampler_that_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ResamplerConfig(**{"windows": [4], "queries": [4], "levels": [0], **fields}).check(side=4, layers=3)
