import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_skip import SkipConfig, preset_config
from llava_skip.flops import decoder_flops, image_cost
from llava_skip.routing import skipped_tokens
from tests.support.small_models import batch_of, mixed_samples, small_model


@pytest.mark.parametrize("skip", [None, SkipConfig(5, 7)])
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_padding_costs_no_ffn_and_counted_flops_equal_the_formula(skip, side):
    model = small_model(skip)
    model.set_attn_implementation("eager")  # torch does not count its fused kernel for CPUs
    inputs = batch_of(mixed_samples(model), side)
    encoded = model.get_image_features(inputs.pop("pixel_values"))
    real = inputs["attention_mask"].bool()
    ffn_tokens = int(real.sum())
    assert ffn_tokens < real.numel()
    if skip is not None:
        ffn_tokens -= int(skipped_tokens(inputs["input_ids"] == model.config.image_token_id, skip).sum())
    with FlopCounterMode(display=False) as counter:
        model(**inputs, mm_encoder_outputs={"image": encoded}, use_cache=False, logits_to_keep=1)
    samples, tokens = inputs["input_ids"].shape
    last = {"asking": 1, "last_ffn_tokens": samples}
    expected = decoder_flops(model.config.text_config, tokens, ffn_tokens, samples, samples, **last)
    assert counter.get_total_flops() == expected.total


def test_paper_sized_models_cost_what_the_paper_says():
    dense, skipping = (image_cost(preset_config(name, "llama3-8b"), 0) for name in ("llava", "sv-llava-100"))
    assert (dense.tokens, dense.cache_tokens) == (576, 576)
    assert (skipping.tokens, skipping.ffn_tokens, skipping.cache_tokens) == (258, 102, 102)
    assert skipping.prefill_flops / dense.prefill_flops == pytest.approx(0.23, abs=0.03)
    assert dense.cache_bytes == 32 * 576 * 2 * 8 * 128 * 2
