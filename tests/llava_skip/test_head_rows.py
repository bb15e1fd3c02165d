"""The last layer for what reaches the head alone: the same numbers as with all tokens, and fewer of them computed."""

import pytest
import torch
from transformers import StaticCache

from llava_skip import SkipConfig, modeling
from llava_skip.reduction.config import ReductionConfig
from tests.support.small_models import ARCHITECTURES, Sample, batch_of, mixed_samples, small_model

INSIDE = ["fastv:9", "pyramiddrop:9", "sparsevlm:9", "shortv:2", "shortv:layers=0+1"]
SHAPES = ["right", "left", "alone"]


def inputs_of(model, shape):
    samples = mixed_samples(model)
    return samples[0].alone() if shape == "alone" else batch_of(samples, shape)


def labels_of(inputs):
    ids = inputs["input_ids"]
    labels = ids.masked_fill((ids >= 80) | (inputs["attention_mask"] == 0), -100)
    labels[:, :3] = -100
    labels[:, 1:][inputs["attention_mask"][:, :-1] == 0] = -100  # no padding gives the next token
    return labels


def both(monkeypatch, compute):
    """What is computed with a last layer for the head alone, and with one for all tokens."""
    found = compute()
    with monkeypatch.context() as patched:
        patched.setattr(modeling, "rows_for_head", lambda *_: None)
        return found, compute()


def step(model, inputs, labels):
    model.zero_grad()
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(monkeypatch, model, inputs, labels):
    model.train()
    (loss, gradients), (expected, of_all) = both(monkeypatch, lambda: step(model, inputs, labels))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert gradients.keys() == of_all.keys()
    for name, gradient in gradients.items():
        scale = float(of_all[name].abs().max())
        torch.testing.assert_close(gradient, of_all[name], rtol=0, atol=1e-6 + 1e-5 * scale)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prefill_and_training_step_equal_those_of_all_tokens(architecture, attention, monkeypatch):
    model = small_model(architecture=architecture)
    model.set_attn_implementation(attention)
    for shape in SHAPES:
        inputs = inputs_of(model.eval(), shape)
        for number in (1, 3):
            with torch.no_grad():
                found, expected = both(monkeypatch, lambda: model(**inputs, logits_to_keep=number).logits)  # noqa: B023
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert_same_step(monkeypatch, model, inputs, labels_of(inputs))


@pytest.mark.parametrize("text", INSIDE)
def test_also_with_a_reduction_inside_the_decoder(text, monkeypatch):
    model = small_model(architecture="llava")
    model.set_reduction(ReductionConfig.parse(text))
    for shape in SHAPES:
        inputs = inputs_of(model.eval(), shape)
        with torch.no_grad():
            found, expected = both(monkeypatch, lambda: model(**inputs, logits_to_keep=1).logits)  # noqa: B023
        real = inputs["attention_mask"][:, -1].bool()
        torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
        assert_same_step(monkeypatch, model, inputs, labels_of(inputs))


def test_a_skipped_token_that_reaches_the_head_takes_no_ffn(monkeypatch):
    model = small_model(SkipConfig(5, 7, summaries=()))
    sample = Sample(model, 1, (3, 2), seed=1)
    sample.input_ids = sample.input_ids[:-2]  # the image ends the prompt, with a skipped token
    inputs = sample.alone()
    with torch.no_grad():
        found, expected = both(monkeypatch, lambda: model(**inputs, logits_to_keep=1).logits)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    caption = Sample(model, 1, (3, 2), seed=1).alone()
    labels = torch.full_like(caption["input_ids"], -100)
    labels[:, -2:] = caption["input_ids"][:, -2:]
    assert_same_step(monkeypatch, model, caption, labels)


def rows_seen(model, run):
    """Tokens that go into each linear layer of the last decoder layer, in the order of the calls."""
    seen, handles = [], []
    for name, module in model.model.language_model.layers[-1].named_modules():
        if isinstance(module, torch.nn.Linear):
            note = lambda _, args, name=name: seen.append((name.split(".")[-1], args[0].shape[:-1].numel()))  # noqa: E731
            handles.append(module.register_forward_pre_hook(note))
    run()
    for handle in handles:
        handle.remove()
    return seen


def test_only_what_reaches_the_head_is_computed():
    model = small_model()
    inputs = batch_of(mixed_samples(model), "right")
    batch, tokens = inputs["input_ids"].shape
    with torch.no_grad():
        prefill = rows_seen(model, lambda: model(**inputs, logits_to_keep=1))
    others = batch * (tokens - 1)
    silent = [("k_proj", others), ("v_proj", others)]
    ffn = [(name, batch) for name in ("o_proj", "gate_proj", "up_proj", "down_proj")]
    assert prefill == [*silent, *((name, batch) for name in ("q_proj", "k_proj", "v_proj")), *ffn]
    labels, model = labels_of(inputs), model.train()
    first = int((labels[:, 1:] != -100).any(dim=0).to(int).argmax())
    training = rows_seen(model, lambda: model(**inputs, labels=labels))
    supervised = int((labels[:, 1:] != -100).sum())
    assert training[:2] == [("k_proj", batch * first), ("v_proj", batch * first)]
    assert training[2] == ("q_proj", batch * (tokens - first)) and training[-1] == ("down_proj", supervised)


def test_whatever_the_mask_the_same_modules_are_called_in_the_same_order():
    # ZeRO gathers a module's parameters when it is called, on all ranks at once.
    model = small_model().train()
    text = Sample(model, 0, (6,), seed=1).alone()
    nothing = torch.full_like(text["input_ids"], -100)
    steps = [(inputs, labels_of(inputs)) for inputs in (inputs_of(model, "right"), inputs_of(model, "alone"), text)]
    orders = [
        [name for name, _ in rows_seen(model, lambda: model(**inputs, labels=labels).loss.backward())]  # noqa: B023
        for inputs, labels in [*steps, (text, nothing)]
    ]
    assert all(order == orders[0] for order in orders) and len(orders[0]) == 9


def test_nothing_supervised_gives_a_loss_and_gradients_of_zero():
    model = small_model().train()
    inputs = inputs_of(model, "right")
    loss, gradients = step(model, inputs, torch.full_like(inputs["input_ids"], -100))
    assert loss == 0 and len(gradients) > 10 and not any(gradient.any() for gradient in gradients.values())


def test_who_asks_for_all_tokens_gets_them():
    model = small_model()
    inputs = inputs_of(model, "alone")
    tokens, labels = inputs["input_ids"].shape[1], labels_of(inputs)
    with torch.no_grad():
        outputs = model(**inputs, logits_to_keep=1, output_hidden_states=True)
        assert [state.shape[1] for state in outputs.hidden_states] == [tokens] * 4
        model.config.text_config.output_hidden_states = True
        assert model(**inputs, logits_to_keep=1).logits.shape[1] == 1
        del model.config.text_config.output_hidden_states
        assert model(**inputs, labels=labels).logits.shape[1] == tokens
        assert model(**inputs, labels=labels, logits_to_keep=1).loss == model(**inputs, labels=labels).loss
        assert model(**inputs, logits_to_keep=0).logits.shape[1] == tokens
        assert model.model(**inputs).last_hidden_state.shape[1] == tokens
    trained = model.train()(**inputs, labels=labels, output_hidden_states=True)
    assert trained.hidden_states[-1].shape[1] == tokens and trained.logits is None
    torch.testing.assert_close(trained.loss, model(**inputs, labels=labels).loss)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_static_cache_that_is_empty_adds_no_keys(attention, monkeypatch):
    model = small_model(architecture="llava")
    model.set_attn_implementation(attention)
    inputs = inputs_of(model, "alone")
    del inputs["attention_mask"]

    def prefill():
        cache = StaticCache(config=model.config.text_config, max_cache_len=64)
        return model(**inputs, past_key_values=cache, logits_to_keep=1).logits

    found, expected = both(monkeypatch, prefill)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
