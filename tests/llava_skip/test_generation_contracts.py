"""What transformers' own generation tests ask: every way to generate, caches, padding, export; dense as stock LLaVA."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM, StaticCache

from llava_skip import LlavaSkipForConditionalGeneration
from tests.support.conversations import byte_tokenizer
from tests.support.small_models import ARCHITECTURES, IMAGE_TOKEN_ID, Sample, batch_of, mixed_samples, small_model
from tests.support.stock import stock_twin

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [IMAGE_TOKEN_ID]}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams that sample": {"num_beams": 2, "do_sample": True},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 7},
    "no cache": {"use_cache": False},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}
every_architecture = pytest.mark.parametrize("model", ARCHITECTURES, indirect=True)
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.fixture
def model(request):
    return small_model(architecture=request.param)


def assert_near(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def generate(model, inputs: dict, **options) -> torch.Tensor:
    torch.manual_seed(11)
    return model.generate(**inputs, **GREEDY | options)


@every_way
def test_a_dense_model_answers_as_the_stock_model(way):
    model = small_model(architecture="llava")
    inputs = batch_of(mixed_samples(model), "left")
    assert torch.equal(generate(model, inputs, **way), generate(stock_twin(model), inputs, **way))


def test_a_dense_model_is_assisted_as_the_stock_model():
    model = small_model(architecture="llava")
    inputs, twin = mixed_samples(model)[1].alone(), stock_twin(model)
    torch.manual_seed(0)
    assistant = LlamaForCausalLM(model.config.text_config).eval()
    for way in (
        {"assistant_model": assistant},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": copy.deepcopy(twin)},
    ):
        assert torch.equal(generate(model, inputs, **way), generate(twin, inputs, **way))


@every_architecture
@pytest.mark.parametrize("name", ["offloaded", "quantized", "no_such_cache"])
def test_a_cache_that_this_machine_cannot_have_is_refused_by_name(model, name):
    named = {"offloaded": "CUDA", "quantized": "quanto", "no_such_cache": "no_such_cache"}[name]
    if name == "offloaded" and torch.cuda.is_available():
        pytest.skip("a GPU takes it")
    with pytest.raises((AssertionError, ImportError, ValueError, RuntimeError), match=named):
        generate(model, mixed_samples(model)[0].alone(), cache_implementation=name)


@every_architecture
def test_what_generate_takes_for_itself_is_not_refused(model):
    inputs = mixed_samples(model)[0].alone()
    shown = []
    streamer = type("Streamer", (), {"put": lambda self, ids: shown.append(ids), "end": lambda self: None})()
    expected = generate(model, inputs)
    assert torch.equal(generate(model, inputs, tokenizer=byte_tokenizer(), streamer=streamer), expected)
    assert len(shown) == 6
    stopped = generate(model, inputs, tokenizer=byte_tokenizer(), stop_strings=["no such text"])
    assert torch.equal(stopped, expected)


@every_architecture
@torch.no_grad()
def test_what_is_kept_of_the_logits(model):
    inputs = batch_of(mixed_samples(model), "left")
    logits = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, logits[:, -2:])  # other sums in the last layer
    assert torch.equal(model(**inputs, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])


@every_architecture
@torch.no_grad()
def test_the_kind_of_numbers_in_a_mask_is_nothing(model):
    inputs = batch_of(mixed_samples(model), "left")
    real = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[real]
    for mask in (real, real.float(), real.int()):
        assert torch.equal(model(**inputs | {"attention_mask": mask}).logits[real], expected)


@every_architecture
def test_reentrant_checkpointing_gives_the_same_gradients(model):
    inputs = batch_of(mixed_samples(model), "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == IMAGE_TOKEN_ID, -100)
    gradients = []
    for one in (copy.deepcopy(model).train(), model.train()):
        if one is not model:
            one.gradient_checkpointing_enable({"use_reentrant": True})
            one.enable_input_require_grads()
        one(**inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_near(gradient, gradients[1][name])


@every_architecture
def test_every_missing_weight_is_drawn_as_in_a_new_model(model):
    config = copy.deepcopy(model.config)
    loaded = LlavaSkipForConditionalGeneration.from_pretrained(None, config=config, state_dict={})
    fresh = dict(LlavaSkipForConditionalGeneration(config).named_parameters())
    for name, parameter in loaded.named_parameters():
        assert abs(parameter.mean() - fresh[name].mean()) < 0.2 and parameter.isfinite().all(), name
        if parameter.numel() > 8:
            assert abs(parameter.std() - fresh[name].std()) <= 0.5 * fresh[name].std() + 1e-6, name
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, dict(model.named_buffers())[name]), name


@every_architecture
@torch.no_grad()
def test_one_token_needs_the_whole_mask_too(model):
    sample, token = mixed_samples(model)[0], torch.tensor([[5]])
    cache = model(**sample.alone(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="attention_mask has 1 columns"):
        model(input_ids=token, attention_mask=torch.ones_like(token), past_key_values=cache)


@every_architecture
@torch.no_grad()
def test_a_static_cache_by_hand_is_continued(model):
    sample = mixed_samples(model)[2].alone()
    more = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=torch.cat([sample["input_ids"], more], dim=1)).logits[:, -3:]
    cache = StaticCache(config=model.config.text_config, max_cache_len=40)
    model(**sample, past_key_values=cache)
    whole = torch.ones(1, sample["input_ids"].shape[1] + 3, dtype=torch.long)
    assert_near(model(input_ids=more, attention_mask=whole, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("model", ["llava", "sv-llava", "sv-cos"], indirect=True)
@torch.no_grad()
def test_a_model_is_exported_as_one_graph(model):
    inputs = batch_of(mixed_samples(model), "left") | {"use_cache": False}
    graph = torch.export.export(model, (), kwargs=inputs, strict=False).module()
    # Of the same lengths, with the images elsewhere.
    others = [Sample(model, 1, (4, 4), seed=5), Sample(model, 2, (5, 3, 3), seed=6), *mixed_samples(model)[2:]]
    for batch in (inputs, batch_of(others, "left") | {"use_cache": False}):
        real = batch["attention_mask"].bool()
        assert_near(graph(**batch).logits[real], model(**batch).logits[real])
