"""Each measure of `llava-skip analyze` against the same thing written out by hand, on tiny random models."""

import math

import numpy as np
import pytest
import torch

from eval.showing.pages import gold_of
from eval.study.analysis import layers, updates
from eval.study.analysis.batches import KINDS, PADDING, block_kinds, make_batch, make_batches
from eval.study.analysis.linear import LinearFit
from eval.study.analysis.numbers import summarise
from eval.study.analysis.questions import Encoded
from eval.study.analysis.walk import decoder_layers, divergence, finish_changed, start
from llava_skip import SkipConfig
from llava_skip.decoder import LANGUAGE_MODELS
from tests.support.small_models import ARCHITECTURES, SKIP, mixed_samples, small_config, small_model

KIND = {name: number for number, name in enumerate(KINDS)}


def encoded(model, answer: int = 0) -> list[Encoded]:
    """Samples with one, two and no images, of different lengths; the last tokens, at most `answer`, are an answer.

    The last token of a prompt is never an image token.
    """
    found = []
    for number, (sample, text) in enumerate(zip(mixed_samples(model), (5, 9, 6, 2), strict=True)):
        length = len(sample.input_ids)
        begin = length - min(answer, text - 1)
        supervised = torch.arange(length) >= begin
        places = sample.input_ids, supervised, begin, sample.pixel_values, sample.crop_counts
        found.append(Encoded(str(number), *places))
    return found


@torch.no_grad()
def by_hand(model, sample: Encoded, layer: int = -1, change: str = "") -> dict[str, list]:
    """A sample alone through the layers, each written out; in `layer` image tokens skip a part of it."""
    inputs = {"input_ids": sample.input_ids[None], "attention_mask": torch.ones(1, len(sample.input_ids))}
    if sample.pixel_values is not None:
        inputs["pixel_values"] = sample.pixel_values
    if sample.crop_counts is not None:
        inputs["crop_counts"] = sample.crop_counts
    batch = make_batch([sample], model.config)
    decoder, image = model.model.language_model, batch.images[0] >= 0
    embedded = model.get_input_embeddings()(inputs["input_ids"])[0].clone()
    if "pixel_values" in inputs:
        blocks = model.model.encode_images(inputs["pixel_values"], inputs.get("crop_counts"))
        embedded[image] = torch.cat(list(blocks))
    x, found = embedded, {"before": [], "attention": [], "after": [], "ffn": []}
    positions = decoder.rotary_emb(x[None], torch.arange(len(x))[None])
    skipped = batch.kinds[0] == KIND["skipped"]
    for index, own in enumerate(decoder.layers):
        causal = torch.ones(len(x), len(x)).tril().bool()[None, None]
        attention = own.self_attn(own.input_layernorm(x)[None], positions, causal)[0][0]
        if index == layer and change in ("attention", "frozen"):
            attention[image] = 0
        after = x + attention
        ffn = own.mlp(own.post_attention_layernorm(after))
        for name, value in zip(found, (x, attention, after, ffn), strict=True):
            found[name].append(value)
        left_out = skipped | (image if index == layer and change in ("ffn", "frozen") else False)
        x = torch.where(left_out[:, None], after, after + ffn)
    return found | {"logits": model.lm_head(decoder.norm(x))}


# ------------------------------------------------------------------------------------------------------------- batches


def test_kinds_of_a_block_are_those_of_the_configuration():
    skip = SkipConfig(3, 4, summaries=((1, 3), (3, 7)), ffn_head=1, ffn_every=3)
    names = [name[0] for name in block_kinds(skip)]
    assert "".join(names) == "rrrsesse" + "s"  # retained, summary, exempt, skipped (2), exempt, summary
    assert block_kinds(skip)[3] == "summary" and block_kinds(skip)[5:7] == ["skipped", "skipped"]
    assert block_kinds(None) == ["image"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_says_what_each_token_is(architecture):
    model = small_model(architecture=architecture)
    samples = encoded(model, answer=2)
    batch = make_batch(samples, model.config)
    is_image = (batch.inputs["input_ids"] == model.config.image_token_id) & batch.inputs["attention_mask"].bool()
    assert torch.equal(batch.kinds == PADDING, batch.inputs["attention_mask"] == 0)
    assert torch.equal(batch.images >= 0, is_image) and batch.images.max() == 4
    skip, tokens = model.config.skip_config, int(is_image.sum())
    for name in ("image", "skipped", "summary", "retained"):
        expected = tokens * (name == "image") if skip is None else 5 * block_kinds(skip).count(name)
        assert int(batch.of_kinds(name).sum()) == expected
    for row, sample in enumerate(samples):
        assert batch.last[row] == sample.prompt_length - 1
        asked = range(int(batch.last[row]), len(sample.input_ids) - 1)
        assert batch.answers[row].nonzero().flatten().tolist() == list(asked) and len(asked) in (1, 2)


# ------------------------------------------------------------------------------------------------------------- updates


@pytest.mark.parametrize("architecture", ["llava", "sv-llava", "sv-llava-hd"])
def test_updates_equal_the_definitions_written_out(architecture):
    model = small_model(architecture=architecture)
    samples = encoded(model)
    result = updates.measure(model, make_batches(samples, model.config, 3))
    expected: dict = {}
    for sample in samples:
        states, kinds = by_hand(model, sample), make_batch([sample], model.config).kinds[0].numpy()
        for update, start_state in (("attention", "before"), ("ffn", "after")):
            for layer in range(3):
                x, u = (np.float64(states[name][layer].numpy()) for name in (start_state, update))
                norm, cosine = np.linalg.norm(x, axis=1), (x * (x + u)).sum(1)
                cosine /= norm * np.linalg.norm(x + u, axis=1)
                values = {
                    "update": np.linalg.norm(u, axis=1) / norm,
                    "norm": np.linalg.norm(x + u, axis=1) / norm,
                    "channels": (np.abs(u) / (np.abs(x) + 1e-6)).mean(1),
                    "turn": 1 - cosine,
                }
                for name, value in values.items():
                    for kind in np.unique(kinds):
                        place = update, name, KINDS[kind], layer
                        expected.setdefault(place, []).extend(value[kinds == kind])
    found = [(u, n, k) for u, by in result["values"].items() for n, own in by.items() for k in own]
    assert {place[:3] for place in expected} == set(found)
    for (update, name, kind, layer), values in expected.items():
        numbers, wanted = result["values"][update][name][kind][layer], summarise(values)
        assert numbers["n"] == len(values)
        for part in ("mean", "q05", "q50", "q95"):
            # The mean of |u_c| / |x_c| hangs on the smallest |x_c|.
            assert numbers[part] == pytest.approx(wanted[part], rel=2e-2 if name == "channels" else 1e-3, abs=1e-5)


def test_what_a_skipped_ffn_would_add_is_named_and_can_be_left_out():
    model = small_model(SkipConfig(5, 7, layers=(1,)))
    batches = make_batches(encoded(model), model.config, 4)
    result, without = updates.measure(model, batches), updates.measure(model, batches, would_be=False)
    assert result["ffn_run"]["skipped"] == [1, 0, 1] and result["ffn_run"]["retained"] == [1, 1, 1]
    counts = [numbers["n"] for numbers in without["values"]["ffn"]["update"]["skipped"]]
    assert counts == [35, 0, 35]
    assert [numbers["n"] for numbers in result["values"]["ffn"]["update"]["skipped"]] == [35, 35, 35]
    assert "would add" in updates.label_of(result, "ffn", "skipped")
    assert updates.label_of(result, "attention", "skipped") == "skipped"


# ---------------------------------------------------------------------------------------------------- one layer changed


@pytest.mark.parametrize("change", layers.CHANGES)
@pytest.mark.parametrize("architecture", ["llava", "sv-llava"])
def test_a_change_in_one_layer_equals_a_forward_written_by_hand(architecture, change):
    model = small_model(architecture=architecture)
    samples = encoded(model, answer=2)
    result = layers.measure(model, make_batches(samples, model.config, 3))
    shown = [sample for sample in samples if sample.pixel_values is not None]
    for layer in range(3):
        first, answers, backward = [], [], []
        for sample in shown:
            full = by_hand(model, sample)["logits"].log_softmax(-1)
            other = by_hand(model, sample, layer, change)["logits"].log_softmax(-1)
            kl, reverse = ((a.exp() * (a - b)).sum(-1) for a, b in ((full, other), (other, full)))
            last = sample.prompt_length - 1
            first.append(kl[last])
            answers.append(kl[last:-1].mean())
            backward.append(reverse[last])
        for name, values in (("kl", first), ("kl_answers", answers), ("shortv", backward)):
            numbers = result[name][change][layer]
            assert numbers["n"] == len(shown)
            assert numbers["mean"] == pytest.approx(float(torch.stack(values).mean()), rel=1e-3, abs=1e-6)
    assert result["kl"][change][0]["mean"] > 1e-5
    assert abs(result["kl"][change][2]["mean"]) < 1e-6  # nothing reads image tokens behind the last layer
    assert result["order"][0] == 2


def test_without_a_change_the_rest_of_the_layers_is_the_model():
    model = small_model()
    walk = start(model, make_batch(encoded(model), model.config))
    none = torch.zeros_like(walk.batch.kinds, dtype=torch.bool)
    same = finish_changed(model, walk, 0, none, ffn=True, attention=True)
    assert torch.allclose(same, walk.final, atol=1e-6)
    assert not divergence(model, walk.final, same)[2].any()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ---------------------------------------------------------------------------------------------------- states of a layer


def test_a_linear_ffn_is_found_to_be_linear():
    model = small_model(None)
    for layer in decoder_layers(model):
        layer.mlp = torch.nn.Linear(32, 32)
    samples = [sample for seed in range(4) for sample in encoded(model)]
    generator = torch.Generator().manual_seed(1)
    for sample in samples:
        if sample.pixel_values is not None:
            sample.pixel_values.copy_(torch.randn(sample.pixel_values.shape, generator=generator))
    fits = layers.measure(model, make_batches(samples, model.config, 5))["linear"]["image"]
    assert [own["r2"] for own in fits] == pytest.approx([1.0] * 3, abs=1e-5)
    assert all(own["fitted"] + own["held_out"] == 4 * 5 * 16 for own in fits)


def test_the_fit_is_least_squares_judged_on_the_other_half():
    torch.manual_seed(1)
    x, first = torch.randn(400, 6), torch.arange(400) % 2 == 0
    y = torch.tanh(2 * x) @ torch.randn(6, 3) + 5
    fit = LinearFit()
    for part in torch.arange(400).split(150):
        fit.add(x[part], y[part], first[part])
    ones = torch.cat([x, torch.ones(400, 1)], 1)
    weights = torch.linalg.lstsq(ones[first], y[first]).solution
    errors = (y[~first] - ones[~first] @ weights).square().sum()
    expected = 1 - errors / (y[~first] - y[~first].mean(0)).square().sum()
    result = fit.result()
    assert result == {"r2": pytest.approx(float(expected), abs=1e-6), "fitted": 200, "held_out": 200}
    few = LinearFit()
    few.add(x[:12], y[:12], first[:12])
    assert few.result()["r2"] is None


def test_equal_images_are_in_one_half():
    model = small_model(None)
    samples = encoded(model)
    batches = make_batches([*samples, *samples], model.config, 3)
    seen: dict[bytes, set] = {}
    for batch, half in zip(batches, layers.image_halves(batches), strict=True):
        for number in range(int(batch.images.max()) + 1):
            where = half[batch.images == number].unique().tolist()
            seen.setdefault(batch.inputs["pixel_values"][number].numpy().tobytes(), set()).update(where)
    assert len(seen) == 5 and all(len(where) == 1 for where in seen.values())
    assert {value for where in seen.values() for value in where} == {True, False}


def test_effective_rank_counts_directions():
    assert layers.effective_rank(3 * torch.eye(5, 9)) == pytest.approx(5)
    assert layers.effective_rank(torch.ones(4, 1) @ torch.randn(1, 7)) == pytest.approx(1, abs=1e-5)
    values = torch.tensor([0.5, 0.3, 0.2])
    assert layers.effective_rank(torch.diag(values)) == pytest.approx(math.exp(-(values * values.log()).sum()))


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_attention_of_one_token_is_a_row_of_the_map(kind):
    from transformers import CONFIG_MAPPING

    from llava_skip import LlavaSkipForConditionalGeneration

    config = small_config(SKIP)
    fields = {k: v for k, v in config.text_config.to_dict().items() if k not in ("model_type", "architectures")}
    config.text_config = CONFIG_MAPPING[kind](**{**fields, "layer_types": None, "sliding_window": None, "head_dim": 8})
    torch.manual_seed(1)
    model = LlavaSkipForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    batch = make_batch(encoded(model), config)
    walk = start(model, batch)
    layer = decoder_layers(model)[0]
    with torch.no_grad():
        _, weights = layer.self_attn(hidden_states=layer.input_layernorm(walk.state), **walk.attention_call(0))
        call = walk.attention_call(0)
        row = layers.attention_of(layer, walk.state, batch.last, call["position_embeddings"], call["attention_mask"])
        causal = layers.attention_of(layer, walk.state, batch.last, call["position_embeddings"], None)
    expected = torch.stack([weights[n, :, last] for n, last in enumerate(batch.last)])
    assert torch.allclose(row, expected, atol=1e-6) and torch.allclose(causal, expected, atol=1e-6)
    masses = layers.attention_masses(layer, walk, 0)
    total = sum(values.nan_to_num() for values in masses.values())
    assert torch.allclose(total, torch.ones(4), atol=1e-5)
    assert masses["skipped"].isnan().tolist() == [False, False, True, False]


def test_notes_count_layers_since_one_may_lead_a_mean():
    def by_layer(*medians):
        return [summarise([value]) for value in medians]

    kinds = {"text": by_layer(50.0, 0.2, 0.2), "image": by_layer(0.5, 0.4, 0.1)}
    values = {update: {"update": kinds} for update in updates.UPDATES}
    ffn, attention = updates.notes({"would_be": True, "ffn_run": {"image": [1.0] * 3}, "values": values})
    assert "of image tokens in 2 of 3 layers. Text over image: 2.00 in the median layer" in ffn
    assert "0.50 in layer 1 to 100.00 in layer 0" in ffn and attention.startswith("attention: ")


def test_the_right_answer_is_shown_where_a_benchmark_has_several():
    assert gold_of({"question": "Which?", "references": ["9", "9", "7"]}) == "9, 7"
    assert gold_of({"question": "Which?"}) == ""


def test_a_value_that_is_not_finite_is_counted_and_left_out():
    numbers = summarise([1.0, 2.0, math.inf, math.nan])
    assert (numbers["n"], numbers["not_finite"], numbers["mean"]) == (2, 2, 1.5)
    assert summarise([])["q50"] is None
