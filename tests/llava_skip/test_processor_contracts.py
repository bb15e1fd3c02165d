"""What transformers' own tests ask of processors: arguments of a call, kinds of images, numbers of image tokens."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForMultimodalLM

from llava_skip import LlavaSkipConfig, LlavaSkipForConditionalGeneration, LlavaSkipProcessor
from llava_skip.vision.tiling import TilingImageProcessorPil
from tests.support.conversations import byte_tokenizer, random_image
from tests.support.small_models import ARCHITECTURES, SKIP, mixed_samples, small_config, small_model

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def processor_of(architecture: str, padded: bool = False) -> LlavaSkipProcessor:
    config = small_config(None, architecture, vocab_size=400)
    config.pad_pictures, config.image_token_index = padded, 3
    return LlavaSkipProcessor.for_config(config, byte_tokenizer(), "v1")


@pytest.fixture
def tiling():
    return TilingImageProcessorPil(crop_size={"height": 16, "width": 16}, do_pad=False)


def pixels(processor, image, **options) -> np.ndarray:
    return processor(image, return_tensors="np", **options)["pixel_values"]


# --- the image processor that cuts tiles


def test_rescaling_and_normalising_are_as_asked_for(tiling):
    image = random_image(40, 60)
    whole, raw = pixels(tiling, image), pixels(tiling, image, do_rescale=False, do_normalize=False)
    assert raw.max() > 200 and raw.dtype == np.uint8  # as of transformers' image processors
    raw = raw.astype(np.float32)
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (tiling.image_mean, tiling.image_std))
    assert np.array_equal(whole, (raw / 255 - mean) / std)
    assert np.array_equal(pixels(tiling, image, do_normalize=False), raw / 255)
    np.testing.assert_allclose(pixels(tiling, image, do_rescale=False), (raw - mean) / std, rtol=1e-6)
    np.testing.assert_allclose(pixels(tiling, image, do_normalize=False, rescale_factor=0.5), raw / 2)
    half = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    np.testing.assert_allclose(pixels(tiling, image, **half), (raw / 255 - 0.5) / 0.25, rtol=1e-6)
    assert np.array_equal(
        pixels(TilingImageProcessorPil(crop_size=16, do_pad=False, **half), image), pixels(tiling, image, **half)
    )


def test_tiles_padding_size_and_filter_are_as_asked_for(tiling):
    image = random_image(80, 20)
    assert pixels(tiling, image).shape == (5, 3, 16, 16)
    assert pixels(tiling, image, max_tiles=2).shape == (3, 3, 16, 16)
    assert tiling(image, max_tiles=2)["crop_counts"].tolist() == [3]
    assert pixels(tiling, image, max_tiles=9, do_pad=True).shape == (5, 3, 16, 16)
    assert pixels(tiling, image, crop_size={"height": 8, "width": 8}).shape == (5, 3, 8, 8)
    assert pixels(tiling, image, size={"shortest_edge": 8}).shape == (5, 3, 8, 8)
    nearest = pixels(tiling, image, resample=Image.Resampling.NEAREST, do_rescale=False, do_normalize=False)
    assert set(np.unique(nearest)) <= set(np.unique(np.asarray(image)))
    assert tiling.count_crops(80, 20) == 5 and tiling.count_crops(80, 20, max_tiles=2) == 3
    assert tiling.count_crops(80, 20, do_pad=True) == 5 == 1 + tiling.count_crops(80, 20, max_tiles=3)


def test_arrays_and_tensors_are_read_as_pictures(tiling):
    image = random_image(40, 60)
    array = np.array(image)
    expected = pixels(tiling, image)
    channels_first = np.ascontiguousarray(array.transpose(2, 0, 1))
    for same in (array, channels_first, torch.from_numpy(channels_first), array.astype(np.float32)):
        assert np.array_equal(pixels(tiling, same), expected)
    assert np.array_equal(pixels(tiling, array / 255, do_rescale=False), expected)
    assert np.array_equal(pixels(tiling, [[array], [array, array]]), np.concatenate([expected] * 3))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tile": 2}, "does not take max_tile"),
        ({"max_tiles": 0}, "max_tiles is 0; it must be at least 1"),
        ({"do_resize": False}, "do_resize is False"),
        ({"do_convert_rgb": False}, "do_convert_rgb is False"),
        ({"pad_size": {"height": 4, "width": 4}}, "pad_size is"),
        ({"data_format": "channels_last"}, "data_format is 'channels_last'"),
        ({"crop_size": {"height": 16, "width": 8}}, "must be one square"),
        ({"crop_size": 16, "size": {"shortest_edge": 20}}, "must be one square"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(tiling, given, message):
    with pytest.raises(ValueError, match=message):
        tiling(random_image(), **given)
    with pytest.raises(ValueError, match=message):
        TilingImageProcessorPil(**{"crop_size": 16} | given)(random_image())


def test_the_image_processor_is_saved_with_its_arguments(tmp_path):
    saved = TilingImageProcessorPil(max_tiles=2, crop_size=16, do_pad=False, do_normalize=False, image_mean=[0.1] * 3)
    saved.save_pretrained(tmp_path)
    for loaded in (TilingImageProcessorPil.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is TilingImageProcessorPil and loaded.to_dict() == saved.to_dict()
    assert np.array_equal(pixels(loaded, random_image(80, 20)), pixels(saved, random_image(80, 20)))


# --- the processor


@every_architecture
@pytest.mark.parametrize("padded", [False, True], ids=["any shape", "padded"])
def test_the_number_of_image_tokens_is_known_before_the_images(architecture, padded):
    processor = processor_of(architecture, padded)
    sizes = [(20, 80), (16, 16), (90, 30)]  # height and width
    images = [random_image(width, height) for height, width in sizes]
    for given in ({}, {"max_tiles": 2}) if "hd" in architecture else ({},):
        counted = processor._get_num_multimodal_tokens(image_sizes=sizes, **given)
        inputs = processor(images=images, text=["<image>"] * 3, padding=True, return_tensors="pt", **given)
        assert counted.num_image_tokens == (inputs["input_ids"] == 3).sum(dim=1).tolist()
        assert counted.num_image_patches == inputs.get("crop_counts", torch.ones(3, dtype=torch.long)).tolist()
    assert processor._get_num_multimodal_tokens().num_image_tokens is None


@every_architecture
def test_unknown_arguments_of_the_images_are_refused(architecture):
    with pytest.raises((ValueError, TypeError), match="max_tile|do_frobnicate"):
        processor_of(architecture).image_processor(random_image(), do_frobnicate=True)


# --- configurations and classes


@every_architecture
def test_the_class_is_found_by_every_name_that_fits(architecture, tmp_path):
    small_model(architecture=architecture).save_pretrained(tmp_path)
    assert type(AutoModelForMultimodalLM.from_pretrained(tmp_path)) is LlavaSkipForConditionalGeneration


@pytest.mark.parametrize("architecture", ["sv-llava", "sv-llava-hd", "sv-cos"])
@torch.no_grad()
def test_a_skipping_model_loaded_as_a_dense_one_fills_its_image_tokens(architecture, tmp_path):
    small_model(architecture=architecture).save_pretrained(tmp_path)
    dense = LlavaSkipForConditionalGeneration.from_pretrained(tmp_path, skip=None).eval()
    assert dense.config.image_seq_length == dense.config.visual_tokens(dense.config.most_crops)
    assert dense.config.to_dict()["image_seq_length"] == dense.config.image_seq_length
    dense.save_pretrained(tmp_path / "dense")
    again = LlavaSkipForConditionalGeneration.from_pretrained(tmp_path / "dense").eval()
    inputs = mixed_samples(dense)[1].alone()
    torch.testing.assert_close(again(**inputs).logits, dense(**inputs).logits)


def test_what_a_configuration_is_loaded_with_is_checked(tmp_path):
    small_config().save_pretrained(tmp_path)
    assert LlavaSkipConfig.from_pretrained(tmp_path, skip={"retained": 3, "skipped": 4}).image_seq_length == 9
    with pytest.raises(ValueError, match="vision tower gives only 16 tokens"):
        LlavaSkipConfig.from_pretrained(tmp_path, skip={"retained": 30, "skipped": 4})
    config = small_config()
    config.skip = None
    assert config.image_seq_length == 16
    config.skip = SKIP.to_dict()
    assert config.image_seq_length == 14
