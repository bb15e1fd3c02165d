"""The last layer for what reaches the head alone: the same numbers as with all tokens, and fewer of them computed."""

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

from llava_skip import ForgettingCache, SkipConfig, head_rows, modeling
from llava_skip.reduction.config import ReductionConfig
from llava_skip.static_cache import StaticForgettingCache
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
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert_same_step(monkeypatch, model, inputs, labels_of(inputs))


@pytest.mark.parametrize("text", INSIDE[:3])
@pytest.mark.parametrize("images", [False, True], ids=["text", "images too"])
def test_labels_of_padding_and_of_dropped_tokens_give_what_all_tokens_give(text, images, monkeypatch):
    model = small_model(architecture="llava")
    model.set_reduction(ReductionConfig.parse(text))
    for shape in SHAPES:
        labels = inputs_of(model, shape)["input_ids"]
        labels = labels if images else labels.masked_fill(labels >= 80, -100)
        assert_same_step(monkeypatch, model, inputs_of(model, shape), labels)


@pytest.mark.parametrize("text", ["fastv:9", None])
def test_layers_that_were_taken_off_are_not_waited_for(text, monkeypatch):
    model = small_model(architecture="llava")
    model.set_reduction(text and ReductionConfig.parse(text))
    model.model.language_model.layers = model.model.language_model.layers[:2]
    inputs = inputs_of(model, "right")
    with torch.no_grad():
        found, expected = both(monkeypatch, lambda: model(**inputs, logits_to_keep=1).logits)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert_same_step(monkeypatch, model, inputs, labels_of(inputs))
    with torch.no_grad():
        rows = rows_seen(model.eval(), lambda: model(**inputs, logits_to_keep=1))
    assert rows[-1] == ("down_proj", 4)  # one token of each sample


@pytest.mark.parametrize("layers", [None, (0, 1)], ids=["all layers", "not the last"])
def test_a_skipped_token_that_reaches_the_head_takes_the_ffn_as_before(layers, monkeypatch):
    model = small_model(SkipConfig(5, 7, summaries=(), layers=layers))
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
        outputs = model(**inputs, logits_to_keep=1)
        assert [state.shape[1] for state in outputs.hidden_states] == [tokens] * 4
        del model.config.text_config.output_hidden_states
        assert model(**inputs, labels=labels).logits.shape[1] == tokens
        assert model(**inputs, labels=labels, logits_to_keep=1).loss == model(**inputs, labels=labels).loss
        assert model(**inputs, logits_to_keep=0).logits.shape[1] == tokens
        assert model.model(**inputs).last_hidden_state.shape[1] == tokens
    trained = model.train()(**inputs, labels=labels, output_hidden_states=True)
    assert trained.hidden_states[-1].shape[1] == tokens and trained.logits is None
    torch.testing.assert_close(trained.loss, model(**inputs, labels=labels).loss)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model.eval()(**inputs, logits_to_keep=1, output_attentions=True).attentions
    assert [one.shape[2:] for one in attentions] == [(tokens, tokens)] * 3


def aligned_with_the_last(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention of an implementation for which transformers makes no mask."""
    assert attention_mask is None
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    return sdpa_attention_forward(module, query, key, value, seen[None, None], scaling=scaling)


def queries_of_all_keys(module, query, key, value, attention_mask, **kwargs):
    """Attention that shares a sequence between processes: each has as many queries as keys."""
    assert query.shape[2] == key.shape[2]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@pytest.mark.parametrize("kind", [DynamicCache, ForgettingCache, StaticForgettingCache])
@torch.no_grad()
def test_a_cache_that_has_tokens_gives_them_all_to_an_attention_without_masks(kind, monkeypatch):
    AttentionInterface.register("aligned_with_the_last", aligned_with_the_last)
    model = small_model(architecture="llava" if kind is DynamicCache else "sv-llava")
    model.set_attn_implementation({"text_config": "aligned_with_the_last"})
    inputs = inputs_of(model, "alone")

    def second_turn():
        cache = kind(6) if kind is StaticForgettingCache else kind()
        model(**inputs, past_key_values=cache)
        return model(torch.arange(5, 10)[None], past_key_values=cache, logits_to_keep=1).logits

    found, expected = both(monkeypatch, second_turn)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_in_training_all_tokens_ask_where_there_is_no_mask(monkeypatch):
    AttentionInterface.register("queries_of_all_keys", queries_of_all_keys)
    model = small_model(architecture="llava").train()
    model.set_attn_implementation({"text_config": "queries_of_all_keys"})
    ids = mixed_samples(model)[2].input_ids[None]
    nothing = {"input_ids": ids, "shift_labels": torch.full_like(ids, -100)}
    assert model(**nothing, position_ids=torch.arange(ids.shape[1])[None]).loss == 0
    monkeypatch.setattr(head_rows, "is_flash_attention_requested", lambda _: True)
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config.text_config)
    rows = rows_seen(model, lambda: model(**nothing, past_key_values=cache))
    assert dict(rows)["q_proj"] == ids.shape[1]


@torch.no_grad()
def test_a_kernel_in_place_of_the_rotary_embedding_turns_all_keys_once(monkeypatch):
    model, turn, lengths = small_model(), modeling_llama.apply_rotary_pos_emb, []
    inputs = inputs_of(model, "alone")
    expected = model(**inputs, logits_to_keep=1).logits

    def kernel(query, key, cosine, sine):
        """As a fused one: it writes into what it gets."""
        lengths.append(key.shape[2])
        return tuple(one.copy_(turn(one, one, cosine, sine)[0]) for one in (query, key))

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", kernel)
    torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits, expected, atol=1e-5, rtol=1e-5)
    tokens = inputs["input_ids"].shape[1]
    assert lengths == [tokens, tokens, tokens - 1, 1]


class Prefill(torch.nn.Module):
    """The logits of the last token."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False, logits_to_keep=1).logits


def test_an_exported_graph_takes_prompts_of_any_length():
    prefill = Prefill(small_model(architecture="llava"))
    shapes = {"input_ids": {1: torch.export.Dim("T", min=2, max=200)}}
    graph = torch.export.export(prefill, (torch.arange(2, 9)[None],), dynamic_shapes=shapes, strict=False).module()
    for ids in (torch.arange(2, 4)[None], torch.arange(2, 30)[None]):
        with torch.no_grad():
            torch.testing.assert_close(graph(ids), prefill(ids), atol=1e-5, rtol=1e-5)


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
