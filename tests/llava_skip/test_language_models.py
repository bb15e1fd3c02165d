"""Each supported language model against transformers' own, and against the method written out over its submodules."""

import pickle

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from llava_skip import LlavaSkipConfig, LlavaSkipForConditionalGeneration, SkipConfig
from llava_skip.decoder import LANGUAGE_MODELS, build_language_model
from llava_skip.flops import decoder_flops
from tests.support.small_models import IMAGE_TOKEN_ID, SKIP, TEXT_SIZES, Sample, batch_of, small_config

NOT_FORGETTING = SkipConfig(5, 7, forget_cache=False)
TEXTS = {
    "llama": lambda **fields: LlamaConfig(**TEXT_SIZES | fields),
    "mistral": lambda **fields: MistralConfig(**TEXT_SIZES | {"head_dim": 12, "sliding_window": None} | fields),
    "qwen2": lambda **fields: Qwen2Config(**TEXT_SIZES | fields),
    "qwen3": lambda **fields: Qwen3Config(**TEXT_SIZES | {"head_dim": 12} | fields),
}
WINDOW = 4
WINDOWS = {
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [IMAGE_TOKEN_ID]}

every_type = pytest.mark.parametrize("kind", TEXTS)


def language_model(kind: str, skip: SkipConfig | None = SKIP, **text) -> LlavaSkipForConditionalGeneration:
    torch.manual_seed(3)
    config = LlavaSkipConfig(
        vision_config=small_config().vision_config,
        text_config=TEXTS[kind](**text),
        image_token_index=IMAGE_TOKEN_ID,
        skip=None if skip is None else skip.to_dict(),
    )
    model = LlavaSkipForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # biases and norms that start at 0 and 1 would hide mistakes
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def stock_model(model):
    """transformers' own XForCausalLM on the model's weights."""
    stock = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    stock.model.load_state_dict(model.model.language_model.state_dict())
    stock.lm_head.load_state_dict(model.lm_head.state_dict())
    return stock


def two_samples(model) -> list[Sample]:
    """Different prompts, of different lengths: one image, and two adjacent ones."""
    return [Sample(model, 1, (3, 5), seed=1), Sample(model, 2, (2, 0, 9), seed=2)]


def skipped_positions(input_ids: torch.Tensor) -> torch.Tensor:
    """[T] bool: an image's block is 5 retained, a summary, 7 skipped, a summary."""
    skipped, count = torch.zeros(len(input_ids), dtype=torch.bool), 0
    for position, token in enumerate(input_ids.tolist()):
        if token == IMAGE_TOKEN_ID:
            skipped[position] = 6 <= count % 14 < 13
            count += 1
    return skipped


def plain(model, sample: Sample, input_ids: torch.Tensor | None = None) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states before and after each layer [1, T, D] and logits [1, T, V] of the method, written out.

    `input_ids` [T] may be longer than the sample's; tokens after the sample do not see its skipped ones.
    """
    stock = stock_model(model)
    input_ids = sample.input_ids if input_ids is None else input_ids
    skipped = skipped_positions(input_ids)
    hidden = stock.model.embed_tokens(input_ids)
    hidden[input_ids == IMAGE_TOKEN_ID] = model.get_image_features(sample.pixel_values).pooler_output.flatten(0, 1)
    hidden = hidden[None]
    length = len(input_ids)
    seen = torch.ones(length, length).tril().bool()
    seen[len(sample.input_ids) :] &= ~skipped
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    rotary = stock.model.rotary_emb(hidden, torch.arange(length)[None])
    states = [hidden]
    for layer in stock.model.layers:
        normed = layer.input_layernorm(hidden)
        hidden = hidden + layer.self_attn(normed, position_embeddings=rotary, attention_mask=mask)[0]
        with_ffn = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        hidden = torch.where(skipped[None, :, None], hidden, with_ffn)
        states.append(hidden)
    return states, stock.lm_head(stock.model.norm(hidden))


@every_type
@torch.no_grad()
def test_the_dense_model_equals_transformers_own_on_text(kind):
    model = language_model(kind, skip=None)
    inputs = batch_of([Sample(model, 0, (9,), seed=1), Sample(model, 0, (6,), seed=2)], "left")
    real = inputs["attention_mask"].bool()
    stock = stock_model(model)
    assert torch.allclose(model(**inputs).logits[real], stock(**inputs).logits[real], atol=1e-5)
    assert torch.equal(model.generate(**inputs, **GREEDY), stock.generate(**inputs, **GREEDY))


@every_type
@torch.no_grad()
def test_skipping_equals_the_method_written_out(kind):
    model = language_model(kind)
    samples = two_samples(model)
    inputs = batch_of(samples, "right")
    logits = model(**inputs).logits
    for index, sample in enumerate(samples):
        _, expected = plain(model, sample)
        assert torch.allclose(logits[index, : len(sample.input_ids)], expected[0], atol=1e-5), f"sample {index}"


@every_type
@torch.no_grad()
def test_generation_in_a_batch_equals_generation_alone_and_one_forward(kind):
    model = language_model(kind)
    samples = two_samples(model)
    together = model.generate(**batch_of(samples, "left"), **GREEDY)
    for index, sample in enumerate(samples):
        alone = model.generate(**sample.alone(), **GREEDY, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(together[index, -6:], alone.sequences[0, -6:]), f"sample {index}"
        _, expected = plain(model, sample, alone.sequences[0])
        logits = expected[0, len(sample.input_ids) - 1 : -1]
        assert torch.allclose(torch.cat(alone.logits), logits, atol=1e-5), f"sample {index}"


WAYS = {
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 5},
}


@every_type
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("skip", [None, SKIP], ids=["dense", "skipping"])
def test_every_way_to_generate_gives_the_same_logits(kind, skip, way):
    model = language_model(kind, skip)
    inputs = batch_of(two_samples(model), "left")
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    expected = torch.stack(model.generate(**inputs, **options).logits)
    logits = torch.stack(model.generate(**inputs, **options, **way).logits)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@every_type
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.no_grad()
def test_half_precision_is_near_full(kind, dtype):
    model = language_model(kind)
    inputs = two_samples(model)[1].alone()
    full = model(**inputs).logits.softmax(-1)
    half = model.to(dtype)(**inputs).logits.float().softmax(-1)
    assert (half - full).abs().mean() < 0.002


@every_type
@pytest.mark.parametrize("skip", [None, SKIP])
@torch.no_grad()
def test_hidden_states_and_attentions_of_every_layer_are_returned(kind, skip):
    model = language_model(kind, skip)
    model.set_attn_implementation("eager")  # the only one that has attention weights
    sample = two_samples(model)[1]
    outputs = model(**sample.alone(), output_hidden_states=True, output_attentions=True)
    length = len(sample.input_ids)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(1, length, 32)] * 4
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(1, 4, length, length)] * 3
    if skip is not None:
        expected, _ = plain(model, sample)
        for layer in range(3):  # the last one is after the final norm
            assert torch.allclose(outputs.hidden_states[layer], expected[layer], atol=1e-5), f"layer {layer}"


@every_type
@torch.no_grad()
def test_save_and_load_round_trip(kind, tmp_path):
    model = language_model(kind)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded.model.language_model) is LANGUAGE_MODELS[kind]
    weights, loaded_weights = model.state_dict(), loaded.state_dict()
    assert weights.keys() == loaded_weights.keys()
    assert all(torch.equal(weight, loaded_weights[name]) for name, weight in weights.items())
    inputs = two_samples(model)[1].alone()
    # Not equal to the bit: loaded weights lie differently in memory, and products of matrices then sum differently.
    assert torch.allclose(model(**inputs).logits, loaded(**inputs).logits, atol=1e-5)


@every_type
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model = language_model(kind).train()
    inputs = batch_of(two_samples(model), "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    once = gradients()
    model.gradient_checkpointing_enable()
    calls = []
    model.model.language_model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    again = gradients()
    assert len(calls) == 2  # once forward, once again for backward
    assert once.keys() == again.keys()
    assert all(torch.allclose(gradient, again[name], atol=1e-6) for name, gradient in once.items())


@every_type
@torch.no_grad()
def test_counted_flops_equal_the_formula(kind):
    model = language_model(kind)
    model.set_attn_implementation("eager")  # torch does not count its fused kernel for CPUs
    sample = two_samples(model)[1]
    encoded = model.get_image_features(sample.pixel_values)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=sample.input_ids[None], mm_encoder_outputs={"image": encoded}, use_cache=False)
    length = len(sample.input_ids)
    expected = decoder_flops(model.config.text_config, length, length - 2 * SKIP.num_skipping, head_tokens=length)
    assert counter.get_total_flops() == expected.total


@every_type
def test_classes_are_found_by_name(kind):
    model = language_model(kind)
    layers = model.model.language_model.layers
    assert type(layers[0]).__name__ in model._no_split_modules  # or a device map would cut a layer in two
    assert type(pickle.loads(pickle.dumps(layers))[0]) is type(layers[0])
    assert model.model.language_model.config_class is type(model.config.text_config)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mistral", r"window \(sliding_window is 4\).* set sliding_window to null"),
        ("qwen2", r"window \(sliding_window is 4, layer_types has full_attention, sliding_attention\)"),
        ("qwen3", "set use_sliding_window to false and layer_types to null, .* or set skip.forget_cache to false"),
    ],
)
def test_a_sliding_window_over_a_cache_that_forgets_is_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        language_model(kind, SKIP, **WINDOWS[kind])


@pytest.mark.parametrize("kind", WINDOWS)
@torch.no_grad()
def test_a_dense_model_with_a_sliding_window_equals_transformers_own(kind):
    model = language_model(kind, None, **WINDOWS[kind])
    inputs = batch_of([Sample(model, 0, (15,), seed=1), Sample(model, 0, (9,), seed=2)], "left")
    real = inputs["attention_mask"].bool()
    stock = stock_model(model)
    assert torch.allclose(model(**inputs).logits[real], stock(**inputs).logits[real], atol=1e-5)
    assert torch.equal(model.generate(**inputs, **GREEDY), stock.generate(**inputs, **GREEDY))
    full = language_model(kind, None)
    assert not torch.allclose(model(**inputs).logits[real], full(**inputs).logits[real], atol=1e-3)


@pytest.mark.parametrize("kind", WINDOWS)
@torch.no_grad()
def test_a_sliding_window_over_a_cache_that_keeps_all_tokens_is_the_uncached_decode(kind):
    model = language_model(kind, NOT_FORGETTING, **WINDOWS[kind])
    samples = two_samples(model)
    together = model.generate(**batch_of(samples, "left"), **GREEDY)
    for index, sample in enumerate(samples):
        options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
        cached = model.generate(**sample.alone(), **options)
        uncached = model.generate(**sample.alone(), **options, use_cache=False)
        assert torch.allclose(torch.cat(cached.logits), torch.cat(uncached.logits), atol=1e-5), f"sample {index}"
        assert torch.equal(together[index, -6:], cached.sequences[0, -6:]), f"sample {index}"


def test_an_unknown_language_model_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="type 'gpt_neox'; supported: llama, mistral, qwen2, qwen3. Their layers are"):
        build_language_model(GPTNeoXConfig())
