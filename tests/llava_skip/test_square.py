"""LLaVA's image processor in less time, with transformers' values; bytes and their values."""

import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_skip.vision.square import SquareImageProcessorPil, resize_padded
from llava_skip.vision.tiling import PADDING_COLOUR, TilingImageProcessorPil, choose_grid
from llava_skip.vision.values import AS_BYTES, PixelValues
from llava_skip_base.errors import UserError
from tests.llava_skip.test_processor_contracts import processor_of
from tests.support.conversations import random_image
from tests.support.small_models import mixed_samples, small_model

SIDE = 24
SIZES = [(1, 1), (40, 20), (20, 40), (SIDE, 9), (9, SIDE), (SIDE, SIDE), (37, 61), (61, 37), (7, 123), (123, 7)]


def both(**more):
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return [made(**sizes | more) for made in (LlavaImageProcessorPil, SquareImageProcessorPil)]


def assert_same(images, theirs, ours, **options):
    expected, found = (p(images, return_tensors="np", **options)["pixel_values"] for p in (theirs, ours))
    assert found.dtype == expected.dtype and np.array_equal(found, expected), (images, options)


def noise(width, height, mode="RGB"):
    return random_image(width, height, seed=width).convert(mode)


@pytest.mark.parametrize("resample", [0, 1, 2, 3])
@pytest.mark.parametrize("do_pad", [True, False])
def test_values_are_those_of_transformers_to_the_last_digit(do_pad, resample):
    theirs, ours = both(do_pad=do_pad, resample=resample)
    for size in SIZES:
        assert_same(noise(*size), theirs, ours)
        assert_same(noise(*size), theirs, ours, **AS_BYTES)
    assert_same([[noise(30, 20)], [noise(9, 20), noise(9, 9)]], theirs, ours, do_normalize=False)
    assert_same(noise(30, 20), theirs, ours, do_rescale=False)


def test_other_images_and_arguments_go_the_way_of_transformers():
    theirs, ours = both(do_pad=True)
    clear = Image.new("RGBA", (30, 20), (9, 9, 9, 0))
    array = np.asarray(noise(30, 20))
    for image in (
        clear,
        clear.convert("LA"),
        noise(30, 20, "L"),
        noise(30, 20, "P"),
        array,
        torch.tensor(array.copy()),
    ):
        assert_same(image, theirs, ours)
    marked = noise(30, 20)
    marked.info["transparency"] = (0, 0, 0)
    assert_same(marked, theirs, ours)
    for options in (
        {"size": {"shortest_edge": 10}, "crop_size": {"height": 10, "width": 10}}, {"image_mean": [0.5] * 3},
        {"do_center_crop": False}, {"resample": 0}, {"do_pad": False}, {"data_format": "channels_last"},
    ):  # fmt: skip
        assert_same(noise(20, 20), theirs, ours, **options)
    for more in (
        {"crop_size": {"height": 30, "width": 10}},
        {"image_mean": 0.5, "do_pad": False},
        {"do_rescale": False},
    ):
        assert_same(noise(33, 20), *both(**{"do_pad": True} | more))


def test_less_memory_moves_than_in_transformers():
    theirs, ours = both(do_pad=True, size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112})
    image, peaks = noise(240, 180), []
    for processor in (theirs, ours):
        processor(image)
        tracemalloc.start()
        processor(image)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 0.6 * peaks[0], peaks


def test_tiles_become_values_in_one_look_up():
    """Rescaled and normalised in turn, each crop would be held two times more as numbers."""
    processor, image = TilingImageProcessorPil(crop_size=112), noise(240, 180)
    processor(image, return_tensors="np")
    tracemalloc.start()
    values = processor(image, return_tensors="np")["pixel_values"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * values.nbytes, peak / values.nbytes  # the values, and the bytes that they are looked up by


def test_a_saved_processor_has_transformers_name_and_is_fast_again(tmp_path):
    made = processor_of("sv-llava")
    assert type(made.image_processor) is SquareImageProcessorPil
    made.save_pretrained(tmp_path)
    stock = LlavaImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_pad=True)
    assert made.image_processor.to_dict() == stock.to_dict()
    assert '"LlavaImageProcessor"' in (tmp_path / "processor_config.json").read_text()
    loaded = AutoProcessor.from_pretrained(tmp_path).image_processor
    assert type(loaded) is SquareImageProcessorPil and loaded.to_dict() == stock.to_dict()
    assert SquareImageProcessorPil.like(tiling := TilingImageProcessorPil(crop_size=16)) is tiling


@pytest.mark.parametrize("size", SIZES)
def test_padding_and_resizing_at_once_is_one_after_the_other(size):
    image, longer = noise(*size), max(size)
    square = Image.new("RGB", (longer, longer), PADDING_COLOUR)
    square.paste(image, ((longer - size[0]) // 2, (longer - size[1]) // 2))
    for side in (16, 2 * longer + 1):
        for resample in (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.NEAREST):
            expected = np.asarray(square.resize((side, side), resample))
            assert np.array_equal(np.asarray(resize_padded(image, side, PADDING_COLOUR, resample)), expected)


@pytest.mark.parametrize("do_pad", [True, False])
def test_tiles_have_the_values_of_rescaling_and_normalising_each_pixel(do_pad):
    tiling = TilingImageProcessorPil(crop_size=SIDE, do_pad=do_pad)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (tiling.image_mean, tiling.image_std))
    for size in SIZES[1:5]:
        image = noise(*size)
        found, raw = (tiling(image, return_tensors="np", **kw)["pixel_values"] for kw in ({}, AS_BYTES))
        columns, rows = choose_grid(*((2 * SIDE,) * 2 if do_pad else size), 4, SIDE)
        assert raw.dtype == np.uint8 and raw.shape == (1 + columns * rows, 3, SIDE, SIDE)
        values = raw.astype(np.float32) / np.float32(255)
        assert np.array_equal(found, (values - mean) / std)


@pytest.mark.parametrize("architecture", ["sv-llava", "sv-llava-hd", "sv-cos"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_makes_the_same_values_of_bytes(architecture, dtype):
    processor = processor_of(architecture)
    inputs = {"images": [noise(30, 20), noise(9, 40)], "text": ["<image>"] * 2, "padding": True, "return_tensors": "pt"}
    whole, small = (processor(**inputs, **options)["pixel_values"] for options in ({}, AS_BYTES))
    values = PixelValues.of(processor)
    assert small.dtype == torch.uint8 and torch.equal(values(small, dtype), whole.to(dtype))
    assert values(whole) is whole
    assert small.nbytes * 4 == whole.nbytes


def test_other_processors_give_their_own_values():
    processor = processor_of("sv-llava")
    processor.image_processor = LlavaImageProcessorPil()
    assert PixelValues.of(processor) is None and PixelValues.of(processor.tokenizer) is None
    processor.image_processor = SquareImageProcessorPil(**AS_BYTES)
    assert PixelValues.of(processor) is None  # its pixels are bytes for everybody


def test_a_model_refuses_bytes():
    model = small_model()
    inputs = mixed_samples(model)[0].alone()
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.uint8)
    with pytest.raises(UserError, match="pixel_values are bytes"):
        model(**inputs)
