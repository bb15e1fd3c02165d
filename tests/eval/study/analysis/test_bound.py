"""The measured error of skipping, and its bounds through the layers of whole models."""

import json

import pytest
import torch

from eval.study.analysis import bound as module
from eval.study.analysis import streams
from eval.study.analysis.bound import draw, measure
from eval.study.analysis.layer_bounds import Affine, FfnBound
from llava_skip import SkipConfig
from llava_skip.reduction import ReductionConfig
from llava_skip.routing import Route, skipped_tokens
from llava_skip_base.errors import UserError
from tests.support.small_models import ARCHITECTURES, Sample, batch_of, mixed_samples, small_model

FEW = 3
"""Steps of power iteration, for tests that look at something else."""


def medians(result, kind, name):
    return [row[kind][name]["q50"] for row in result["layers"]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_bounds_hold_in_every_layer(architecture):
    model = small_model(architecture=architecture)
    samples = [Sample(model, 0, (6,), seed=3), Sample(model, 2, (1, 4, 2), seed=4)]
    result = measure(model, [batch_of(samples, "left")], steps=FEW, progress=False)
    assert result["violations"] == {"one_layer": 0, "local": 0, "global": 0}
    assert result["samples"] == 1 and result["left_out"] is None  # one has no image
    dense = model.config.skip is None
    assert result["skipping"] == ("all image tokens" if dense else "of the checkpoint")
    for kind in ("skipped", "text"):
        for row in result["layers"]:
            assert 0 <= row[kind]["measured"]["most"] <= row[kind]["local"]["most"], row["layer"]
    # Text differs only once it attends to states that differ: its own error cannot be all that a bound starts from.
    assert medians(result, "text", "measured")[0] == medians(result, "text", "local")[0] == 0
    assert min(medians(result, "text", "measured")[1:]) > 0
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def two_runs(model, inputs):
    """States after each layer and log-probabilities, with skipping and without, by two forwards."""
    with_skipping = model(**inputs, use_cache=False, output_hidden_states=True)
    given = {}

    def without_route(language_model, args, arguments):
        given.update(arguments | {"route": Route(), "output_hidden_states": True})
        return args, given

    handle = model.model.language_model.register_forward_pre_hook(without_route, with_kwargs=True)
    without = model(**inputs, use_cache=False, output_hidden_states=True)
    handle.remove()
    return with_skipping, without


@torch.no_grad()
def test_what_is_measured_is_the_difference_of_two_forwards():
    model = small_model()
    inputs = Sample(model, 1, (3, 5), seed=1).alone()
    result = measure(model, [inputs], steps=1, progress=False)
    x, y = two_runs(model, inputs)
    skipped = skipped_tokens(inputs["input_ids"] == model.config.image_token_id, model.config.skip_config)
    text = torch.zeros_like(skipped)
    text[:, -5:] = True
    for layer in range(2):  # the states after the last layer are not among hidden_states: it has the normed ones
        for kind, mask in (("skipped", skipped), ("text", text)):
            a, b = x.hidden_states[layer + 1][mask], y.hidden_states[layer + 1][mask]
            assert medians(result, kind, "measured")[layer] == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-4)
            each = ((b - a).norm(dim=-1) / a.norm(dim=-1)).mean()
            assert result["layers"][layer][kind]["per_token"]["mean"] == pytest.approx(float(each), rel=1e-4)
    assert result["kl"]["mean"] == pytest.approx(kl_at(model, inputs, -1), rel=1e-3)


def test_a_padded_batch_equals_its_samples_alone():
    model = small_model()
    samples = [Sample(model, 1, (3, 5), seed=1), Sample(model, 2, (2, 0, 9), seed=2)]
    together, right = (measure(model, [batch_of(samples, s)], steps=FEW, progress=False) for s in ("left", "right"))
    apart = measure(model, [sample.alone() for sample in samples], steps=FEW, progress=False)

    def compare(one, other, path=""):
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            for name in one:
                compare(one[name], other[name], f"{path}.{name}")
        elif isinstance(one, list):
            for number, pair in enumerate(zip(one, other, strict=True)):
                compare(*pair, f"{path}.{number}")
        else:
            assert one == (pytest.approx(other, rel=2e-3, abs=1e-6) if isinstance(one, float) else other), path

    compare(together, apart)
    compare(right, apart)


def test_layers_that_do_not_skip_pass_errors_on():
    model = small_model(SkipConfig(5, 7, layers=(1,)), num_hidden_layers=4)
    batch = batch_of(mixed_samples(model)[:2], "right")
    result = measure(model, [batch], steps=FEW, progress=False)
    assert [row["skips"] for row in result["layers"]] == [False, True, False, False]
    assert result["violations"] == {"one_layer": 0, "local": 0, "global": 0}
    assert [value > 0 for value in medians(result, "skipped", "global")] == [False, True, True, True]
    assert [value > 0 for value in medians(result, "text", "local")] == [False, False, True, True]
    assert "skipped" in result["layers"][2]["constants"]["ffn"] and "constants" not in result["layers"][1]


@torch.no_grad()
def test_bounds_pass_from_layer_to_layer_as_the_theorems_say(monkeypatch):
    """Made-up constants: every factor of the weights is 1, attention adds at most 2, gains depend on the two groups."""
    model = small_model(SkipConfig(5, 7, layers=(0, 1)))
    inputs = Sample(model, 1, (3, 5), seed=1).alone()
    one = Affine(1.0)
    monkeypatch.setattr(FfnBound, "of", lambda layer: FfnBound(one, one, one, 1.0))
    monkeypatch.setattr(module, "attention_bound", lambda layer: 2.0)

    def gain(function, point, start, inside, outside, dims, steps):  # 7 tokens are skipped, 6 are behind, twice each
        return point.norm(dim=dims) * 0 + inside.sum() / 100 + outside.sum() / 1000

    monkeypatch.setattr(module, "largest_gain", gain)
    result = measure(model, [inputs], steps=1, progress=False)
    states, without = two_runs(model, inputs)
    skipped = skipped_tokens(inputs["input_ids"] == model.config.image_token_id, model.config.skip_config)[0]
    text = torch.arange(len(skipped)) >= len(skipped) - 5
    sizes = {"skipped": [], "text": []}
    for hidden in states.hidden_states[1:3]:
        sizes["skipped"].append(float(hidden[0, skipped].norm()))
        sizes["text"].append(float(hidden[0, text].norm()))
    added = [added_by_ffn(model, number, without.hidden_states[number])[skipped].norm() for number in (0, 1)]
    s, b = 0.14, 0.12  # the sums of the two masks
    first = float(added[0])
    local = {"skipped": [first, first + (s + s / 10) * first + float(added[1])]}
    local["text"] = [0.0, (s + b / 10) * first * (1 + 0.011)]
    anywhere = {"skipped": [1.0, 1 + 2 * 2 + 1], "text": [0.0, 2 * 2 + 2 * 1]}
    for kind, count in (("skipped", 7), ("text", 5)):
        for layer in (0, 1):
            expected = [local[kind][layer], anywhere[kind][layer] * count**0.5]
            seen = [medians(result, kind, name)[layer] * sizes[kind][layer] for name in ("local", "global")]
            assert seen == pytest.approx(expected, rel=1e-4), (kind, layer)
    last = [row[kind]["global"]["q50"] / row[kind]["local"]["q50"] for row in result["layers"][2:] for kind in sizes]
    uppers = {"skipped": (6 + 4 + 2) * 7**0.5, "text": (6 + 4 + 2) * 5**0.5}  # the last layer skips nothing
    from_both = {to: [(s + o / 10), (b + o / 10)] for to, o in (("skipped", s), ("text", b))}
    for kind, ratio in zip(sizes, last, strict=True):
        own = local["skipped"][1] * from_both[kind][0] + local["text"][1] * from_both[kind][1] + local[kind][1]
        assert uppers[kind] / (own * 1.011) == pytest.approx(ratio, rel=1e-4)


def added_by_ffn(model, number, hidden):
    """|silu(gate n) * up n| [T] of one layer, for states [1, T, D] that enter it."""
    language_model = model.model.language_model
    layer = language_model.layers[number]
    positions = language_model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    mask = torch.full((hidden.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
    normed = layer.input_layernorm(hidden)
    hidden = hidden + layer.self_attn(hidden_states=normed, position_embeddings=positions, attention_mask=mask)[0]
    normed = layer.post_attention_layernorm(hidden)[0]
    return (torch.nn.functional.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)).norm(dim=-1)


def test_a_bound_that_is_too_low_is_counted(monkeypatch):
    model = small_model()
    of = FfnBound.of
    monkeypatch.setattr(FfnBound, "of", lambda layer: FfnBound(*(Affine(1e-3),) * 3, of(layer).largest_input))
    monkeypatch.setattr(module, "attention_bound", lambda layer: 0.0)
    monkeypatch.setattr(module, "largest_gain", lambda f, point, start, i, o, dims, n: 0 * point.norm(dim=dims))
    result = measure(model, [Sample(model, 1, (3, 5), seed=1).alone()], steps=1, progress=False)
    assert min(result["violations"].values()) > 0


def test_another_activation_is_measured_without_bounds(tmp_path):
    model = small_model(hidden_act="gelu")
    result = measure(model, [Sample(model, 1, (3, 5), seed=1).alone()], steps=1, progress=False)
    assert "gelu" in result["left_out"] and result["violations"] is None
    assert all(row.keys() == {"layer", "skips", "skipped", "text"} for row in result["layers"])
    assert all(row["skipped"].keys() == {"measured", "per_token"} for row in result["layers"])
    assert [file.name for file in draw(result, tmp_path) if file.stat().st_size > 1000] == ["error-of-skipping.png"]


def test_prompts_that_end_with_an_image_or_go_on_with_an_answer(tmp_path):
    model = small_model()
    sample = Sample(model, 1, (3, 0), seed=1)
    result = measure(model, [sample.alone()], steps=1, progress=False)
    assert medians(result, "text", "measured") == [None] * 3
    files = draw(result, tmp_path)
    assert [file.name for file in files] == ["error-of-skipping.png", "one-layer-bound.png"]
    sample = Sample(model, 1, (3, 5), seed=1)
    whole, cut = sample.alone(), {n: v[:, :-2] if v.ndim == 2 else v for n, v in sample.alone().items()}
    last = torch.tensor([whole["input_ids"].shape[1] - 3])
    answers = torch.arange(whole["input_ids"].shape[1])[None] >= last
    batches = (whole | {"last": last, "answers": answers}, cut, whole)
    given = [measure(model, [batch], steps=1, progress=False) for batch in batches]
    kl = [found["kl"]["mean"] for found in given]
    assert kl[0] == pytest.approx(kl[1], rel=1e-3) and kl[0] != pytest.approx(kl[2], rel=0.1)
    assert [found["kl_answers"]["n"] for found in given] == [3, 0, 0]
    read = [kl_at(model, whole, place) for place in (-3, -2, -1)]
    assert given[0]["kl_answers"]["mean"] == pytest.approx(sum(read) / 3, rel=1e-3)


@torch.no_grad()
def kl_at(model, inputs, place):
    """KL of the token after one place, of two forwards."""
    p, q = (outputs.logits[0, place].log_softmax(-1) for outputs in reversed(two_runs(model, inputs)))
    return float((p.exp() * (p - q)).sum())


def test_what_cannot_be_measured_is_said(monkeypatch):
    model = small_model()
    with pytest.raises(UserError, match="No prompt has an image"):
        measure(model, [Sample(model, 0, (6,), seed=3).alone()], progress=False)
    monkeypatch.setattr(streams, "is_flash_attention_requested", lambda config: True)
    with pytest.raises(UserError, match="attn_implementation sdpa or eager"):
        measure(model, [Sample(model, 1, (3, 5), seed=1).alone()], progress=False)


def test_a_reduction_leaves_its_tokens_to_skip_and_one_between_layers_is_refused(monkeypatch):
    model = small_model(skip=None)
    model.set_reduction(ReductionConfig.parse("random:6"))
    result = measure(model, [Sample(model, 1, (3, 5), seed=1).alone()], steps=1, progress=False)
    assert result["layers"][0]["skipped"]["per_token"]["n"] == 6
    monkeypatch.setattr(type(model.config.reduction_config.rule), "in_decoder", True)
    with pytest.raises(UserError, match="random:6, which drops or freezes tokens between the layers"):
        measure(model, [], progress=False)


def test_the_model_is_left_as_it_was():
    model = small_model().train()
    inputs = Sample(model, 1, (3, 5), seed=1).alone()
    measure(model, [inputs], steps=1, progress=False)
    assert model.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
