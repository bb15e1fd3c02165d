import weakref

import pytest
import torch
from transformers import DynamicCache

from llava_skip import ForgettingCache
from llava_skip.cache import GROWTH, GrowingLayer
from llava_skip.routing import skipped_tokens
from tests.support.small_models import Sample, batch_of, mixed_samples, small_model

NUM_IMAGES = (1, 2, 0, 2)


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_after_the_prefill_only_unskipped_tokens_are_stored_in_every_layer(side):
    model = small_model()
    samples = mixed_samples(model)
    cache = model(**batch_of(samples, side)).past_key_values
    assert isinstance(cache, ForgettingCache)
    skip = model.config.skip_config
    text = [len(sample.input_ids) - n * skip.length for sample, n in zip(samples, NUM_IMAGES, strict=True)]
    expected = [words + n * (skip.retained + 2) for words, n in zip(text, NUM_IMAGES, strict=True)]
    assert cache.mask.sum(1).tolist() == expected
    assert [layer.keys.shape[-2] for layer in cache.layers] == [max(expected)] * 3
    assert [layer.values.shape[-2] for layer in cache.layers] == [max(expected)] * 3
    assert cache.get_seq_length() == max(len(sample.input_ids) for sample in samples)


@torch.no_grad()
def test_never_more_than_one_layers_skipped_tokens_are_alive():
    model = small_model()
    sample = mixed_samples(model)[1].alone()
    alive, most = [], []

    class Watched(ForgettingCache):
        def update(self, keys, values, layer_idx, *args, **kwargs):
            visible = super().update(keys, values, layer_idx, *args, **kwargs)
            most.append(sum(reference() is not None for reference in alive))
            alive.append(weakref.ref(visible[0]))
            return visible

    model(**sample, past_key_values=Watched(), use_cache=True)
    assert len(most) == 3 and max(most) == 0  # what an earlier layer saw is gone when the next one stores


@torch.no_grad()
def test_stored_tokens_are_those_of_the_full_cache():
    model = small_model()
    sample = mixed_samples(model)[3]
    full = DynamicCache(config=model.config.text_config)
    model(**sample.alone(), past_key_values=full, use_cache=True)
    forgetting = model(**sample.alone()).past_key_values
    kept = ~skipped_tokens(sample.input_ids[None] == model.config.image_token_id, model.config.skip_config)[0]
    for ours, theirs in zip(forgetting.layers, full.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys[:, :, kept])
        assert torch.equal(ours.values, theirs.values[:, :, kept])


@torch.no_grad()
def test_a_decode_step_copies_nothing_until_the_buffer_is_full():
    layer = GrowingLayer()
    layer.update(torch.randn(1, 2, 10, 4), torch.randn(1, 2, 10, 4))
    pointer = layer.keys.data_ptr()
    for _ in range(GROWTH):
        layer.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))
        assert layer.keys.data_ptr() == pointer
    before = layer.keys.clone()
    layer.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))
    assert layer.keys.data_ptr() != pointer
    assert torch.equal(layer.keys[..., :-1, :], before)


@torch.no_grad()
def test_growing_layer_equals_concatenation():
    ours, theirs = GrowingLayer(), DynamicCache()
    for size in (5, 1, 1, GROWTH, 3, 1):
        keys, values = torch.randn(2, 2, size, 4), torch.randn(2, 2, size, 4)
        got, expected = ours.update(keys, values), theirs.update(keys, values, 0)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    order = torch.tensor([1, 0])
    ours.reorder_cache(order), theirs.reorder_cache(order)
    ours.crop(-4), theirs.crop(-4)
    ours.batch_repeat_interleave(2), theirs.batch_repeat_interleave(2)
    assert torch.equal(ours.keys, theirs.layers[0].keys) and torch.equal(ours.values, theirs.layers[0].values)
    ours.batch_select_indices(torch.tensor([0, 3])), theirs.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(ours.values, theirs.layers[0].values)
    ours.reset()
    assert ours.get_seq_length() == 0


@torch.no_grad()
def test_cropping_takes_back_what_came_last():
    model = small_model()
    inputs = batch_of(mixed_samples(model), "left")
    cache = model(**inputs).past_key_values
    more = torch.tensor([[5, 6, 7]] * 4)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    once = model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
    cache.crop(-3)
    again = model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(once, again)


def test_gradients_flow_through_a_cached_forward():
    model = small_model().train()
    sample = Sample(model, 0, (6,), seed=1).alone()
    cache = model(**sample, use_cache=True).past_key_values
    logits = model(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True).logits
    logits.sum().backward()
    assert model.model.language_model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
