"""Variants of the method as data: what they change, and which ones contradict themselves."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_skip import SkipConfig, preset_config
from llava_skip.flops import decoder_flops
from llava_skip.presets import skip_for_model
from tests.support.small_models import batch_of, mixed_samples, real_tokens, small_config, small_model

SIZES = {"retained": 5, "skipped": 7}


def layout(skip: SkipConfig) -> str:
    """The block in letters: R and S tokens, Q summaries; s for a skipped token that keeps its FFN."""
    tokens = "R" * skip.retained + "S" * skip.skipped
    letters, position = "", 0
    for number, token in enumerate(tokens, start=1):
        letters += token if skip.skipping[position] or token == "R" else "s"
        position += 1
        for _ in range([end for _, end in skip.spans].count(number)):
            letters, position = letters + "Q", position + 1
    return letters


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "RRRRRQSSSSSSSQ"),
        ({"summaries": ()}, "RRRRRSSSSSSS"),
        ({"summaries": [[5, 12]]}, "RRRRRSSSSSSSQ"),
        ({"summaries": [[0, 2], [2, 5], [5, 12]]}, "RRQRRRQSSSSSSSQ"),
        ({"ffn_tail": 2}, "RRRRRQSSSSSssQ"),
        ({"ffn_head": 1, "ffn_tail": 1}, "RRRRRQsSSSSSsQ"),
        ({"ffn_every": 3}, "RRRRRQsSSsSSsQ"),
    ],
)
def test_a_block_is_laid_out_as_configured(fields, expected):
    skip = SkipConfig(**SIZES, **fields)
    assert layout(skip) == expected
    assert skip.length == len(expected) and skip.num_skipping == expected.count("S")
    assert SkipConfig.from_dict(skip.to_dict()) == skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ffn_tail": 7}, "each of the 7 skipped tokens takes the FFN"),
        ({"ffn_every": 1}, "skip.ffn_every is 1; it must be a whole number from 2"),
        ({"ffn_head": -1}, "skip.ffn_head is -1"),
        ({"summaries": [[3, 3]]}, r"the span \(3, 3\)"),
        ({"summaries": [[0, 13]]}, r"the span \(0, 13\); it must be first, end with 0 <= first < end <= 12"),
        ({"summaries": [[5, 12], [0, 5]]}, "the spans must be in the order of their ends"),
        ({"summary_start": "max"}, "skip.summary_start is 'max'; known: pooled, mean, learned"),
        ({"layers": []}, "skip.layers is"),
        ({"layers": [1, 1]}, "skip.layers is"),
        ({"text_sees_skipped": False, "forget_cache": False}, "text_sees_skipped and forget_cache are both false"),
    ],
)
def test_impossible_combinations_are_refused_with_the_reason(fields, message):
    with pytest.raises(ValueError, match=message):
        SkipConfig(**SIZES, **fields)


def test_a_layer_that_the_model_does_not_have_is_refused():
    with pytest.raises(ValueError, match="names layer 3, but the language model has 3 layers"):
        small_config(SkipConfig(**SIZES, layers=(0, 3)))


VARIANTS = {
    "no summary": {"summaries": ()},
    "learned": {"summary_start": "learned"},
    "mean": {"summary_start": "mean"},
    "exceptions": {"ffn_head": 1, "ffn_tail": 1},
    "every third": {"ffn_every": 3},
    "one layer": {"layers": (1,)},
    "hidden from text": {"text_sees_skipped": False},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_variant_in_a_mixed_batch_equals_itself_alone(fields, attention):
    model = small_model(SkipConfig(**SIZES, **fields))
    model.set_attn_implementation(attention)
    samples = mixed_samples(model)
    batch = batch_of(samples, "left")
    together = model(**batch).logits
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for index, sample in enumerate(samples):
        alone = model(**sample.alone()).logits[0]
        torch.testing.assert_close(real_tokens(together, batch, index), alone, atol=1e-5, rtol=1e-5)
        assert generated[index].tolist() == model.generate(**sample.alone(), **options)[0, len(alone) :].tolist()


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_flops_counted_in_a_variant_equal_the_formula(fields):
    skip = SkipConfig(**SIZES, **fields)
    model = small_model(skip)
    model.set_attn_implementation("eager")  # torch does not count its fused kernel for CPUs
    inputs = mixed_samples(model)[3].alone()  # two images
    encoded = model.get_image_features(inputs.pop("pixel_values"))
    with FlopCounterMode(display=False) as counter:
        model(**inputs, mm_encoder_outputs={"image": encoded}, use_cache=False)
    text, tokens = model.config.text_config, inputs["input_ids"].shape[1]
    ffn_tokens = tokens - 2 * skip.mean_num_skipping(text.num_hidden_layers)
    assert counter.get_total_flops() == decoder_flops(text, tokens, ffn_tokens, head_tokens=tokens).total


@torch.no_grad()
def test_text_that_may_not_see_skipped_tokens_does_not_depend_on_them():
    skip = SkipConfig(**SIZES, summaries=((0, 5),), text_sees_skipped=False)
    model = small_model(skip)
    inputs = mixed_samples(model)[3].alone()
    features = model.get_image_features(inputs.pop("pixel_values"))
    before = model(**inputs, mm_encoder_outputs={"image": features}).logits
    first = skip.retained + 1
    features.pooler_output[:, first : first + skip.skipped] += 1.0
    after = model(**inputs, mm_encoder_outputs={"image": features}).logits
    text = inputs["input_ids"][0] < 90
    assert torch.equal(before[0, text], after[0, text])
    skipped = torch.tensor(skip.skipping).repeat(2)
    assert not torch.isclose(before[0, ~text][skipped], after[0, ~text][skipped]).all(dim=-1).any()


@pytest.mark.parametrize(
    ("model", "preset", "sizes"), [("llava", "sv-llava-256", (16, 20)), ("cos", "sv-cos", (17, 16))]
)
def test_a_dense_model_takes_the_numbers_of_a_preset_of_its_kind(model, preset, sizes):
    skip = skip_for_model(preset, preset_config(model))
    assert (skip.retained, skip.skipped) == sizes
    with pytest.raises(ValueError, match="for another one, whose projector would not fit"):
        skip_for_model("sv-llava-hd", preset_config(model))


def test_a_preset_of_more_queries_is_refused_and_those_that_fit_are_named():
    with pytest.raises(
        ValueError, match="'cos' and 5 queries, the preset 'sv-cos' .* presets of the model's: cos-80.$"
    ):
        skip_for_model("sv-cos", preset_config("cos-80"))
