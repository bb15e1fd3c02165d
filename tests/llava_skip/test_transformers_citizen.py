"""What users of transformers expect of any model: adapters, speculative decoding, compilation, every attention."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from tests.small_models import ARCHITECTURES, IMAGE_TOKEN_ID, batch_of, mixed_samples, small_model

OPTIONS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
SKIPPING = [name for name in ARCHITECTURES if name.startswith("sv-")]


@pytest.fixture(params=SKIPPING)
def model(request):
    return small_model(architecture=request.param)


def test_lora_on_the_language_model_alone(model):
    inputs = mixed_samples(model)[0].alone()
    before = model.generate(**inputs, **OPTIONS)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj)"))
    adapted.train()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= IMAGE_TOKEN_ID, -100)
    adapted(**inputs, labels=labels).loss.backward()
    learning = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * 3 * 3 and all("language_model" in name for name in learning)
    assert all(gradient.any() for name, gradient in learning.items() if "lora_B" in name)
    assert torch.equal(adapted.eval().generate(**inputs, **OPTIONS), before)  # B starts at zero


def test_a_text_assistant_and_prompt_lookup_give_the_same_text(model):
    inputs = mixed_samples(model)[0].alone()
    expected = model.generate(**inputs, **OPTIONS)
    torch.manual_seed(0)
    assistant = LlamaForCausalLM(model.config.text_config).eval()
    assert torch.equal(model.generate(**inputs, **OPTIONS, assistant_model=assistant), expected)
    # The prompt holds many image tokens, which lookup proposes as if they were text.
    assert torch.equal(model.generate(**inputs, **OPTIONS, prompt_lookup_num_tokens=3), expected)


def test_chunked_prefill_is_refused_where_rows_would_be_lost(model):
    inputs = mixed_samples(model)[0].alone()
    with pytest.raises(
        ValueError, match="prefill_chunk_size is set, but a skipping model takes its prompt in one piece"
    ):
        model.generate(**inputs, **OPTIONS, prefill_chunk_size=4)


def test_chunked_prefill_of_a_dense_model_gives_the_same_text():
    model = small_model(architecture="llava")
    inputs = mixed_samples(model)[0].alone()
    expected = model.generate(**inputs, **OPTIONS)
    assert torch.equal(model.generate(**inputs, **OPTIONS, prefill_chunk_size=5), expected)


def test_a_picture_that_is_missing_behind_a_prompt_is_an_error(model):
    sample = mixed_samples(model)[0]
    cache = model(**sample.alone(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the pictures fill 0"):
        model(input_ids=sample.input_ids[None], past_key_values=cache)


def test_the_vocabulary_can_grow(model):
    inputs = mixed_samples(model)[0].alone()
    before = model(**inputs).logits
    model.resize_token_embeddings(128)
    after = model(**inputs).logits
    assert after.shape[-1] == model.config.text_config.vocab_size == 128
    torch.testing.assert_close(after[..., :100], before)


@torch.no_grad()
def test_flex_attention_agrees_with_sdpa(model):
    batch = batch_of(mixed_samples(model), "right")
    real = batch["attention_mask"].bool()
    expected = model(**batch).logits[real]
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(**batch).logits[real], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_hidden_states_and_attentions_of_every_layer(model):
    model.set_attn_implementation("eager")
    inputs = mixed_samples(model)[0].alone()
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    layers, rows = model.config.text_config.num_hidden_layers, inputs["input_ids"].shape[1]
    assert len(outputs.hidden_states) == layers + 1 and len(outputs.attentions) == layers
    assert outputs.attentions[0].shape[-2:] == (rows, rows)


def test_compiled_decoding_gives_the_same_text():
    model = small_model(architecture="sv-llava")
    inputs = mixed_samples(model)[0].alone()
    expected = model.generate(**inputs, **OPTIONS)
    model.forward = torch.compile(model.forward)
    assert torch.equal(model.generate(**inputs, **OPTIONS), expected)
