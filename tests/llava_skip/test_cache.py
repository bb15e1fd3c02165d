import copy
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from llava_skip import ForgettingCache, SkipConfig
from llava_skip.cache import GROWTH, GrowingLayer
from llava_skip.routing import skipped_tokens
from tests.support.small_models import SKIP, Sample, batch_of, mixed_samples, small_model

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


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_cropping_across_images_leaves_what_a_shorter_prompt_would_have_left(side):
    model = small_model()
    inputs = batch_of(mixed_samples(model), side)
    full = DynamicCache(config=model.config.text_config)
    model(**inputs, past_key_values=full, use_cache=True)
    whole = model(**inputs).past_key_values
    is_image = inputs["input_ids"] == model.config.image_token_id
    kept = inputs["attention_mask"].bool() & ~skipped_tokens(is_image, model.config.skip_config)
    length = whole.get_seq_length()
    for left in range(length + 1):
        cache = copy.deepcopy(whole)
        cache.crop(-1 if left < length else 0)
        cache.crop(min(0, left - length + 1))  # in two steps
        assert cache.get_seq_length() == left
        for ours, theirs in zip(cache.layers, full.layers, strict=True):
            stored = torch.ones(4, ours.length, dtype=torch.bool) if cache.mask is None else cache.mask
            for index in range(4):
                assert torch.equal(
                    ours.keys[index][:, stored[index]], theirs.keys[index, :, :left][:, kept[index, :left]]
                )


@torch.no_grad()
def test_a_prompt_that_was_taken_back_can_be_given_again():
    model = small_model()
    inputs = batch_of(mixed_samples(model), "left")
    start, cache = torch.tensor([[5, 6, 7]] * 4), ForgettingCache()
    model(input_ids=start, past_key_values=cache)
    mask = torch.cat([torch.ones_like(start), inputs["attention_mask"]], dim=1)
    more = inputs | {"attention_mask": mask, "past_key_values": cache}
    once = model(**more).logits
    cache.crop(-inputs["input_ids"].shape[1])
    assert cache.get_seq_length() == cache.get_query_offset() == 3
    assert cache.mask is None
    torch.testing.assert_close(model(**more).logits, once)


@pytest.mark.parametrize("when", ["after the turn", "after its chunks", "among its chunks"])
@torch.no_grad()
def test_cropping_reaches_into_earlier_turns(when):
    model = small_model()
    inputs = batch_of(mixed_samples(model), "left")
    mask, length = inputs["attention_mask"], inputs["input_ids"].shape[1]
    twice, once = ForgettingCache(), ForgettingCache()
    model(**inputs, past_key_values=once)
    model(**inputs, past_key_values=twice)
    once.crop(-4)
    with nullcontext() if when == "after the turn" else twice.chunked_prefill():
        model(**inputs | {"attention_mask": mask.repeat(1, 2)}, past_key_values=twice)
        if when == "among its chunks":
            twice.crop(-length - 4)
    if when != "among its chunks":
        twice.crop(-length - 4)
    assert twice.get_seq_length() == once.get_seq_length() == length - 4
    more = {"input_ids": torch.tensor([[5, 6, 7]] * 4)}
    more["attention_mask"] = nn.functional.pad(mask[:, :-4], (0, 3), value=1)
    torch.testing.assert_close(model(**more, past_key_values=twice).logits, model(**more, past_key_values=once).logits)


@torch.no_grad()
def test_cropping_follows_the_samples_when_they_are_reordered():
    model = small_model()
    cache = model(**batch_of(mixed_samples(model), "left")).past_key_values
    order = torch.tensor([2, 0, 0, 1])
    cropped, reordered = copy.deepcopy(cache), copy.deepcopy(cache)
    for one, steps in ((cropped, ("crop", "reorder")), (reordered, ("reorder", "crop"))):
        for step in steps:
            one.crop(-12) if step == "crop" else one.reorder_cache(order)
    one, other = ((cache.layers[0].keys.transpose(1, 2)[cache.mask]) for cache in (cropped, reordered))
    assert torch.equal(one, other)


@torch.no_grad()
def test_cropping_a_prompt_in_chunks():
    model = small_model()
    sample = mixed_samples(model)[0].alone()
    whole = model(**sample).past_key_values
    cache = ForgettingCache()
    with cache.chunked_prefill():
        model(**sample, past_key_values=cache)
        cache.crop(-2)
        model(input_ids=sample["input_ids"][:, -2:], past_key_values=cache, prompt_images=sample["input_ids"] == 90)
    assert cache.get_seq_length() == whole.get_seq_length()
    for ours, theirs in zip(cache.layers, whole.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
    cache.crop(-7)  # two tokens of the image are left, both retained
    assert cache.get_query_offset() < whole.get_query_offset() - 5


def test_cropping_takes_a_number_of_0_or_less():
    with pytest.raises(ValueError, match="as 0 or less; got 3"):
        ForgettingCache().crop(3)


@torch.no_grad()
def test_a_cache_is_iterated_over_as_those_of_transformers():
    model = small_model()
    sample, caches = mixed_samples(model)[2].alone(), (ForgettingCache(), DynamicCache())
    for cache in caches:
        model(**sample, past_key_values=cache)
    for ours, theirs in zip(*caches, strict=True):
        assert len(ours) == len(theirs) == 3
        torch.testing.assert_close(ours[:2], theirs[:2])


@pytest.mark.parametrize(
    ("skip", "kind"),
    [(None, DynamicCache), (SkipConfig(5, 7, forget_cache=False), DynamicCache), (SKIP, ForgettingCache)],
)
def test_only_a_model_that_forgets_makes_a_cache_that_does(skip, kind):
    model = small_model(skip)
    sample = mixed_samples(model)[0].alone()
    assert type(model(**sample).past_key_values) is kind
    outputs = model.generate(**sample, max_new_tokens=2, return_dict_in_generate=True, pad_token_id=0)
    assert type(outputs.past_key_values) is kind


@torch.no_grad()
def test_a_cache_that_was_reset_is_like_a_new_one():
    model = small_model()
    inputs = batch_of(mixed_samples(model), "left")
    cache = ForgettingCache()
    once = model(**inputs, past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(**inputs, past_key_values=cache).logits, once)
