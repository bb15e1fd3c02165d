"""The forgetting cache of static shape: its size, that it stays in place, and that it can be continued."""

import copy

import pytest
import torch
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import CompileConfig

from llava_skip import ForgettingCache
from llava_skip.static_cache import StaticForgettingCache
from tests.support.small_models import IMAGE_TOKEN_ID, SKIP, Sample, batch_of, mixed_samples, small_model

NEW = 6
READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Reads(TorchDispatchMode):
    """Counts what reads the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in READS
        return func(*args, **(kwargs or {}))


def step(model, cache, mask, number):
    """Logits of a step with one given token, and the mask behind it."""
    mask = pad(mask, (0, 1), value=1)
    positions = mask.sum(dim=1, keepdim=True) - 1
    token = torch.full((len(mask), 1), 7 + number)
    return model(token, attention_mask=mask, position_ids=positions, past_key_values=cache).logits, mask


def places(cache):
    """Where the tensors of a cache are, and how large they are."""
    tensors = [tensor for keys, values, _ in cache for tensor in (keys, values)]
    return [(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()) for tensor in tensors]


@pytest.mark.parametrize("side", ["left", "alone"])
@torch.no_grad()
def test_it_holds_what_is_kept_and_the_new_tokens_and_stays_in_place(side):
    model = small_model()
    samples = mixed_samples(model)
    inputs = samples[0].alone() if side == "alone" else batch_of(samples, side)
    cache, growing = StaticForgettingCache(NEW), ForgettingCache()
    for each in (cache, growing):
        model(**inputs, past_key_values=each, logits_to_keep=1)
    kept = growing.get_query_offset()
    of_each = [
        len(sample.input_ids) - SKIP.num_skipping * (0 if sample.pixel_values is None else len(sample.pixel_values))
        for sample in samples
    ]
    assert kept == (of_each[0] if side == "alone" else max(of_each))
    mask, seen = inputs["attention_mask"], []
    for number in range(NEW):
        logits, longer = step(model, cache, mask, number)
        expected, mask = step(model, growing, mask, number)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(longer, mask)
        seen.append(places(cache))
        assert int(cache.get_seq_length()) == growing.get_seq_length()
    assert all(found == seen[0] for found in seen)
    keys = cache.layers[0].keys
    numbers = keys.shape[0] * keys.shape[1] * keys.shape[3]
    assert {size for _, size in seen[0]} == {numbers * (kept + NEW) * 4}
    with pytest.raises(IndexError):
        step(model, cache, mask, NEW)


@torch.no_grad()
def test_a_compiled_kind_of_step_reads_nothing_from_the_device():
    model = small_model()
    cache, inputs = StaticForgettingCache(NEW), batch_of(mixed_samples(model), "left")
    model(**inputs, past_key_values=cache, logits_to_keep=1)
    cache.fix()
    token, positions = torch.full((4, 1), 7), torch.full((4, 1), 50)
    seen = cache.step_mask(4)[:, None, None]
    with Reads() as reads:
        model(token, attention_mask=seen, position_ids=positions, past_key_values=cache, logits_to_keep=1)
    assert reads.count == 0


@torch.no_grad()
def test_it_is_continued_like_the_growing_one():
    model = small_model()
    first, second = Sample(model, 1, (3, 5), seed=1), Sample(model, 1, (2, 4), seed=2)
    found = []
    for cache in (StaticForgettingCache(NEW), ForgettingCache()):
        inputs = first.alone()
        pixels = inputs.pop("pixel_values")
        model(**inputs, pixel_values=pixels, past_key_values=cache)
        logits, mask = step(model, cache, inputs["attention_mask"], 0)
        cache.crop(-1)
        again, mask = step(model, cache, inputs["attention_mask"], 0)
        torch.testing.assert_close(again, logits)
        ids = second.input_ids[None]
        mask = pad(mask, (0, ids.shape[1]), value=1)
        turn = model(ids, attention_mask=mask, pixel_values=second.pixel_values, past_key_values=cache).logits
        cache.batch_repeat_interleave(2)
        last, _ = step(model, cache, mask.repeat_interleave(2, dim=0), 1)
        found.append((logits, turn, last))
        assert cache.get_query_offset() == len(first.input_ids) + len(ids[0]) + 2 - 2 * SKIP.num_skipping
        cache.reset()
        assert cache.get_seq_length() == 0
        model(**inputs, pixel_values=pixels, past_key_values=cache)
        assert int(cache.get_seq_length()) == len(first.input_ids)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_beams_and_samples_are_those_of_the_growing_one(options):
    model = small_model()
    inputs = batch_of(mixed_samples(model), "left")
    found = []
    for way in ({}, {"cache_implementation": "static"}):
        torch.manual_seed(0)
        found.append(model.generate(**inputs, **way, **options, max_new_tokens=NEW, pad_token_id=0))
    assert torch.equal(*found)


@pytest.mark.parametrize("least", [0, 200], ids=["places as they are", "more places"])
@torch.no_grad()
def test_what_places_held_before_is_not_seen(least):
    model = small_model()
    inputs, cache = batch_of(mixed_samples(model), "left"), StaticForgettingCache(NEW, least)
    growing = ForgettingCache()
    for each in (cache, growing):
        model(**inputs, past_key_values=each)
    for layer in cache.layers:
        for buffer in layer._buffers.values():
            assert buffer.shape[2] == layer.length + NEW
            buffer[:, :, layer.length :] = torch.nan
    logits, _ = step(model, cache, inputs["attention_mask"], 0)
    torch.testing.assert_close(logits, step(model, growing, inputs["attention_mask"], 0)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_samples_change_places_with_their_padding():
    model, found, order = small_model(), [], torch.tensor([2, 0, 1, 3])
    inputs = batch_of(mixed_samples(model), "left")
    for cache in (StaticForgettingCache(NEW), ForgettingCache()):
        model(**inputs, past_key_values=cache)
        _, mask = step(model, cache, inputs["attention_mask"], 0)
        cache.reorder_cache(order)
        found.append(step(model, cache, mask[order], 1)[0])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("number", [NEW, 2 * NEW])
@pytest.mark.parametrize("words", [0, 4], ids=["the same text goes on", "a second question"])
def test_another_generate_goes_on_after_it(number, words):
    model = small_model()
    inputs, found = mixed_samples(model)[3].alone(), []
    options = {"do_sample": False, "pad_token_id": 0, "suppress_tokens": [IMAGE_TOKEN_ID]}
    for way in ({"cache_implementation": "static"}, {}):
        outputs = model.generate(**inputs, **options, **way, max_new_tokens=NEW, return_dict_in_generate=True)
        ids = torch.cat([outputs.sequences, torch.arange(10, 10 + words)[None]], dim=1)
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": outputs.past_key_values}
        found.append(model.generate(**more, **options, max_new_tokens=number))
    assert found[0].shape[1] == ids.shape[1] + number
    assert torch.equal(*found)


@torch.no_grad()
def test_an_assistant_gives_the_same_text_with_it_and_a_static_cache_of_all_tokens_is_refused():
    model = small_model()
    inputs, options = mixed_samples(model)[0].alone(), {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    proposed = {"assistant_model": copy.deepcopy(model), "cache_implementation": "static"}
    assert torch.equal(model.generate(**inputs, **options, **proposed), model.generate(**inputs, **options))
    dense = small_model(None)
    inputs = mixed_samples(dense)[0].alone()
    with pytest.raises(ValueError, match="not supported with Static cache"):
        dense.generate(**inputs, **options, **proposed | {"assistant_model": copy.deepcopy(dense)})


def test_a_shorter_prompt_is_decoded_by_the_graph_of_a_longer_one():
    model = small_model()
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True  # transformers compiles for accelerators alone, otherwise
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"cache_implementation": "static", "return_dict_in_generate": True, "pad_token_id": 0}
    places = []
    for text in ((1, 24), (3, 9), (2, 17)):
        inputs = Sample(model, 1, text, seed=1).alone()
        outputs = model.generate(**inputs, **options, compile_config=compiled, max_new_tokens=NEW)
        places.append(outputs.past_key_values.places)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert places == [25 + SKIP.length - SKIP.num_skipping + NEW] * 3
    outputs = model.generate(**inputs, **options, max_cache_len=100, max_new_tokens=NEW)
    assert outputs.past_key_values.places == 100


def test_generate_sizes_it():
    model = small_model()
    sample = mixed_samples(model)[0]
    options = {"cache_implementation": "static", "return_dict_in_generate": True, "do_sample": False, "pad_token_id": 0}
    length = len(sample.input_ids)
    for size in ({"max_new_tokens": NEW}, {"max_length": NEW + length}, {}):
        cache = model.generate(**sample.alone(), **options, **size).past_key_values
        assert type(cache) is StaticForgettingCache
        assert cache.places == length - SKIP.num_skipping + (NEW if size else 20)
