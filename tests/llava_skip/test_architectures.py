"""What holds for every architecture, dense and skipping."""

import pytest
import torch

from llava_skip import LlavaSkipForConditionalGeneration
from tests.support.small_models import ARCHITECTURES, batch_of, mixed_samples, real_tokens, small_model

pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_sample_in_a_mixed_padded_batch_equals_the_sample_alone(architecture, side, attention):
    model = small_model(architecture=architecture)
    model.set_attn_implementation(attention)
    samples = mixed_samples(model)
    batch = batch_of(samples, side)
    together = model(**batch).logits
    for index, sample in enumerate(samples):
        alone = model(**sample.alone()).logits[0]
        torch.testing.assert_close(real_tokens(together, batch, index), alone, atol=1e-5, rtol=1e-5)


def test_generation_in_a_batch_equals_generation_alone(architecture):
    model = small_model(architecture=architecture)
    samples = mixed_samples(model)
    batch = batch_of(samples, "left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for index, sample in enumerate(samples):
        alone = model.generate(**sample.alone(), **options)[0, len(sample.input_ids) :]
        assert together[index].tolist() == alone.tolist()


def test_beams_keep_their_images(architecture):
    model = small_model(architecture=architecture)
    samples = mixed_samples(model)
    batch = batch_of(samples, "left")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for index, sample in enumerate(samples):
        alone = model.generate(**sample.alone(), **options)[0, len(sample.input_ids) :]
        assert together[index].tolist() == alone.tolist()


@torch.no_grad()
def test_after_the_prefill_the_cache_holds_only_what_is_kept(architecture):
    model = small_model(architecture=architecture)
    sample = mixed_samples(model)[3]
    cache = model(**sample.alone(), use_cache=True).past_key_values
    skip = model.config.skip_config
    dropped = 2 * skip.num_skipping if skip else 0
    assert [layer.keys.shape[-2] for layer in cache.layers] == [len(sample.input_ids) - dropped] * 3
    assert cache.get_seq_length() == len(sample.input_ids)


def gradients(model, inputs, labels):
    model.train()
    model.zero_grad()
    model(**inputs, labels=labels).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_every_used_parameter_has_a_gradient_and_checkpointing_gives_the_same_gradients(architecture):
    model = small_model(architecture=architecture)
    batch = batch_of(mixed_samples(model), "right")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] >= 90, -100)
    plain = gradients(model, batch, labels)
    missing = {name for name, gradient in plain.items() if gradient is None}
    # The features come from an inner layer of the tower.
    assert all(".vision_tower.encoder.layers.2." in n or ".post_layernorm." in n for n in missing)
    silent = [name for name, gradient in plain.items() if gradient is not None and not gradient.any()]
    # Biases before a softmax over tokens cancel (method, section 4); biases of keys do in any attention.
    assert all(n.endswith(("summary.norm.bias", "summary.score.bias", "k_proj.bias")) for n in silent), silent
    model.gradient_checkpointing_enable()
    for name, gradient in gradients(model, batch, labels).items():
        if gradient is not None:
            torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-5)


def test_text_only_training_reaches_every_parameter_that_images_reach(architecture):
    model = small_model(architecture=architecture)
    samples = mixed_samples(model)
    reached = []
    for chosen in (samples[:2], [samples[2]]):
        batch = batch_of(chosen, "right")
        labels = batch["input_ids"].masked_fill(batch["input_ids"] >= 90, -100)
        reached.append({name for name, g in gradients(model, batch, labels).items() if g is not None})
    assert reached[0] == reached[1]


@torch.no_grad()
def test_save_and_load_round_trip(architecture, tmp_path):
    model = small_model(architecture=architecture)
    model.save_pretrained(tmp_path)
    loaded, report = LlavaSkipForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    inputs = mixed_samples(model)[1].alone()
    torch.testing.assert_close(loaded.eval()(**inputs).logits, model(**inputs).logits)
    assert (loaded.config.front_end, loaded.config.skip) == (model.config.front_end, model.config.skip)


@torch.no_grad()
def test_half_precision_is_near_full(architecture):
    model = small_model(architecture=architecture)
    inputs = mixed_samples(model)[0].alone()
    full = model(**inputs).logits.log_softmax(-1)
    half = model.to(torch.bfloat16)(**inputs).logits.float().log_softmax(-1)
    # Choices on near ties may differ; on the whole the distributions stay close.
    assert (full.exp() - half.exp()).abs().mean() < 0.01
