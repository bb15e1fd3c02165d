"""Generation gives the same logits whatever the cache, the size of the chunks, or who proposes tokens."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LlamaConfig, StaticCache

from llava_skip import ForgettingCache, SkipConfig
from llava_skip.routing import skipped_tokens
from llava_skip.static_cache import StaticForgettingCache
from tests.support.small_models import (
    ARCHITECTURES,
    IMAGE_TOKEN_ID,
    Sample,
    batch_of,
    images_of,
    mixed_samples,
    small_model,
)

OPTIONS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
LOGITS = {**OPTIONS, "output_logits": True, "return_dict_in_generate": True}
HIDDEN_FROM_TEXT = {"skip": SkipConfig(5, 7, text_sees_skipped=False)}
MODELS = {name: {"architecture": name} for name in ARCHITECTURES} | {"hidden from text": HIDDEN_FROM_TEXT}
WAYS = {
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunks of 1": {"prefill_chunk_size": 1},
    "chunks of 1, static cache": {"prefill_chunk_size": 1, "cache_implementation": "static"},
    "chunks of 5": {"prefill_chunk_size": 5},
    "chunks of 5, static cache": {"prefill_chunk_size": 5, "cache_implementation": "static"},
    "one chunk": {"prefill_chunk_size": 1000},
}
CACHES = {
    "forgetting": lambda model: ForgettingCache(),
    "dynamic": lambda model: DynamicCache(config=model.config.text_config),
    "forgetting, static": lambda model: StaticForgettingCache(40),
    "static": lambda model: StaticCache(config=model.config.text_config, max_cache_len=200),
}


@pytest.fixture(params=MODELS)
def model(request):
    return small_model(**MODELS[request.param])


def logits(model, inputs, **options) -> torch.Tensor:
    """[B, new tokens, V]."""
    return torch.stack(model.generate(**inputs, **LOGITS, **options).logits, dim=1)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_to_generate_gives_the_same_logits(model, way):
    inputs = batch_of(mixed_samples(model), "left")
    torch.testing.assert_close(logits(model, inputs, **way), logits(model, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_every_attention_masks_what_no_cache_has_forgotten(attention):
    """Of the last sample torch's flex attention on a CPU at times gives other numbers, for stock LLaMA, too."""
    model = small_model()
    samples = mixed_samples(model)
    inputs = batch_of([*samples, samples[0]], "left")
    expected = logits(model, inputs)
    model.set_attn_implementation(attention)
    found = logits(model, inputs, use_cache=False)
    torch.testing.assert_close(found[:-1], expected[:-1], atol=1e-5, rtol=1e-4)


def test_flash_attention_is_refused_where_a_mask_is_needed():
    model = small_model()
    inputs = mixed_samples(model)[0].alone()
    model.model.language_model.config = LlamaConfig(attn_implementation="flash_attention_2")
    prompt_images = inputs["input_ids"][:, :-2] == IMAGE_TOKEN_ID  # the last two tokens were generated
    with pytest.raises(ValueError, match="which needs a mask, and flash attention takes none"):
        model(**inputs, prompt_images=prompt_images, generated=2, use_cache=False)


@pytest.mark.parametrize("cache", [CACHES["forgetting"], CACHES["dynamic"]])
@pytest.mark.parametrize("sample", range(3))
def test_accepted_proposals_do_not_see_skipped_tokens(model, sample, cache):
    inputs = mixed_samples(model)[sample].alone()
    expected = model.generate(**inputs, **LOGITS)
    # The model proposes to itself: all is accepted, and the first forward has the prompt and what follows it.
    proposed = model.generate(**inputs, **LOGITS, assistant_model=copy.deepcopy(model), past_key_values=cache(model))
    assert torch.equal(proposed.sequences, expected.sequences)
    torch.testing.assert_close(torch.cat(proposed.logits), torch.cat(expected.logits), atol=1e-5, rtol=1e-5)


def test_chunks_do_not_disturb_an_assistant(model):
    inputs = mixed_samples(model)[1].alone()
    expected = model.generate(**inputs, **LOGITS)
    chunks = model.generate(**inputs, **LOGITS, assistant_model=copy.deepcopy(model), prefill_chunk_size=4)
    assert torch.equal(chunks.sequences, expected.sequences)


def test_threads_generate_with_one_model_at_once(model):
    prompts = [sample.alone() for sample in mixed_samples(model)]
    expected = [model.generate(**inputs, **OPTIONS) for inputs in prompts]
    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(model.generate, **inputs, **OPTIONS, prefill_chunk_size=5) for inputs in prompts * 3]
        assert all(torch.equal(job.result(), tokens) for job, tokens in zip(jobs, expected * 3, strict=True))


def test_a_call_that_fails_leaves_no_prompt(model):
    sample = mixed_samples(model)[0]
    with pytest.raises(ValueError, match="has 14 image tokens|image tokens, the images fill 0"):
        model.generate(sample.input_ids[None], **OPTIONS)
    inputs = model.prepare_inputs_for_generation(sample.input_ids[None], is_first_iteration=True)
    assert "prompt_images" not in inputs


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, ForgettingCache),
        ({"cache_implementation": "dynamic"}, ForgettingCache),
        ({"generation_config": GenerationConfig(cache_implementation="dynamic", max_new_tokens=2)}, ForgettingCache),
        ({"cache_implementation": "static"}, StaticForgettingCache),
        ({"use_cache": False}, type(None)),
    ],
    ids=["default", "dynamic", "dynamic in a configuration", "static", "none"],
)
def test_the_default_cache_forgets_and_another_is_taken_as_asked_for(options, kind):
    model = small_model()
    options = {"max_new_tokens": 2, "pad_token_id": 0, "return_dict_in_generate": True} | options
    outputs = model.generate(**mixed_samples(model)[0].alone(), **options)
    assert type(outputs.past_key_values) is kind


def one_forward(model, input_ids: torch.Tensor, images: dict, phases: list[int]) -> torch.Tensor:
    """Logits [T, V] of one forward; a token sees skipped tokens of its own phase alone; `phases` has their lengths."""
    length = len(input_ids)
    skipped = skipped_tokens((input_ids == IMAGE_TOKEN_ID)[None], model.config.skip_config)[0]
    phase = torch.arange(len(phases)).repeat_interleave(torch.tensor(phases))
    seen = torch.ones(length, length).tril().bool() & (~skipped[None, :] | (phase[:, None] == phase[None, :]))
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        return model(input_ids=input_ids[None], attention_mask=mask, use_cache=False, **images).logits[0]


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("chunks", [{}, {"prefill_chunk_size": 4}], ids=["whole", "chunks"])
@pytest.mark.parametrize("architecture", ["sv-llava", "sv-llava-hd", "sv-cos"])
def test_a_second_turn_with_a_new_image_goes_on_after_a_cache(architecture, chunks, cache):
    model = small_model(architecture=architecture)
    first, second = Sample(model, 1, (3, 5), seed=1), Sample(model, 2, (2, 0, 4), seed=9)
    options = {**LOGITS, "suppress_tokens": [IMAGE_TOKEN_ID], "past_key_values": cache(model)}
    one = model.generate(**first.alone(), **options, **chunks)
    input_ids = torch.cat([one.sequences, second.input_ids[None]], dim=1)
    two = model.generate(input_ids, **images_of([second]), **options, **chunks)
    phases = [len(first.input_ids), 5, 1 + len(second.input_ids), 6]  # the last token of an answer is not stored yet
    expected = one_forward(model, two.sequences[0], images_of([first, second]), phases)
    torch.testing.assert_close(torch.cat(one.logits), expected[phases[0] - 1 :][:6], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(two.logits), expected[-7:-1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_chunks_by_hand_see_each_other_until_the_prompt_ends(model):
    batch = batch_of(mixed_samples(model), "left")
    images = batch["input_ids"] == IMAGE_TOKEN_ID
    features = torch.cat(list(model.get_image_features(**images_of(mixed_samples(model))).pooler_output))
    whole = ForgettingCache()
    expected = model(**batch, past_key_values=whole).logits
    # Features belong to image tokens in the order of the batch: those of a chunk are not next to each other.
    order = images.flatten().cumsum(0).view_as(images) - 1
    cache, chunks = ForgettingCache(), []
    with cache.chunked_prefill():
        for start in range(0, images.shape[1], 7):
            columns = slice(start, start + 7)
            block = features[order[:, columns][images[:, columns]]]
            encoded = {"image": type("Output", (), {"pooler_output": block[None]})} if len(block) else None
            outputs = model(
                input_ids=batch["input_ids"][:, columns],
                attention_mask=batch["attention_mask"][:, : start + 7],
                mm_encoder_outputs=encoded,
                prompt_images=images[:, : start + 7],
                past_key_values=cache,
            )
            chunks.append(outputs.logits)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(chunks, dim=1)[real], expected[real], atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == whole.get_seq_length() == images.shape[1]
    stored = torch.ones_like(real) if whole.mask is None else whole.mask
    for ours, theirs in zip(cache.layers, whole.layers, strict=True):
        assert ours.keys.shape[-2] == theirs.keys.shape[-2]  # the same tokens are left, at the same positions
        for kept, expected_states in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            pick = [kept.transpose(1, 2)[:, :, 0][stored], expected_states.transpose(1, 2)[:, :, 0][stored]]
            torch.testing.assert_close(*pick, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_prompt_that_fails_leaves_the_cache_usable():
    model = small_model()
    inputs = mixed_samples(model)[0].alone()
    cache = ForgettingCache()
    with pytest.raises(ValueError, match="image tokens"), cache.chunked_prefill():
        model(input_ids=inputs["input_ids"], past_key_values=cache)
    expected = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, past_key_values=cache).logits, expected)
