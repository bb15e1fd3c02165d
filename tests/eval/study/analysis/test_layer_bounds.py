"""The theorems about one layer, and what they take from the weights."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from eval.study.analysis.layer_bounds import Affine, FfnBound, attention_bound, hidden_product, why_unbounded
from eval.study.analysis.spectral import TOLERANCE, largest_gain, largest_singular_value, power_iteration
from llava_skip.decoder import build_language_model
from tests.support.small_models import TEXT_SIZES, small_model

FAMILIES = {
    "llama": lambda: LlamaConfig(**TEXT_SIZES, mlp_bias=True, attention_bias=True),
    "mistral": lambda: MistralConfig(**TEXT_SIZES | {"head_dim": 12, "sliding_window": None}),
    "qwen2": lambda: Qwen2Config(**TEXT_SIZES),
    "qwen3": lambda: Qwen3Config(**TEXT_SIZES | {"head_dim": 12}),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def random_layer(family, seed):
    """A layer whose weights have a scale and a shape of their own: dense, of rank one, or with one large row."""
    torch.manual_seed(seed)
    layer = build_language_model(FAMILIES[family]()).layers[0]
    for number, parameter in enumerate(layer.parameters()):
        parameter.data = torch.randn_like(parameter) * 10.0 ** torch.empty(()).uniform_(-2, 1)
        if parameter.ndim == 2 and (seed + number) % 3 == 1:
            parameter.data = parameter.data[:, :1] @ parameter.data[:1]
        if parameter.ndim == 2 and (seed + number) % 3 == 2:
            parameter.data[0] *= 50
    return layer.double()


@pytest.mark.parametrize("shape", [(5, 5), (7, 30), (40, 6)])
def test_the_largest_singular_value(shape):
    for seed in range(20):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
        exact = float(torch.linalg.svdvals(weight)[0])
        assert largest_singular_value(weight) == pytest.approx((exact, exact), rel=1e-9)
        lower, upper = largest_singular_value(weight, exact_side=1, seed=seed)
        assert lower <= exact * (1 + 1e-5) and exact <= upper <= exact * (1 + TOLERANCE) * (1 + 1e-5)
        assert lower >= 0.97 * exact


def test_power_iteration_on_hard_matrices():
    close = torch.diag(torch.linspace(0.999, 1.0, 50))  # it has not converged, and the bound holds
    lower, upper = power_iteration(close)
    assert 0.99 < lower <= 1.0 <= upper <= 1.06
    assert power_iteration(torch.zeros(4, 9)) == (0.0, 0.0)
    line = torch.outer(torch.eye(30)[3], torch.ones(40))
    assert largest_singular_value(line, exact_side=1).upper == pytest.approx(math.sqrt(40), rel=1e-5)  # the norm


@every_family
@torch.no_grad()
def test_an_ffn_never_adds_more_than_its_bound(family):
    for seed in range(40):
        layer = random_layer(family, seed)
        bound = FfnBound.of(layer)
        states = torch.randn(60, 32).double() * 10.0 ** torch.empty(60, 1).uniform_(-3, 3)
        states[0] = layer.mlp.gate_proj.weight.data[0]  # along a row of a weight
        normed = layer.post_attention_layernorm(states)
        added, norms = layer.mlp(normed).norm(dim=-1), normed.norm(dim=-1)
        product = bound.down.at(hidden_product(layer.mlp, normed).norm(dim=-1))
        for smaller, larger in ((added, product), (product, bound.at(norms)), (norms, bound.largest_input)):
            assert (smaller <= larger * (1 + 1e-6)).all(), (seed, float((smaller / larger).max()))
        assert (bound.at(norms) <= bound.anywhere * (1 + 1e-6)).all()


def attained():
    """An FFN whose bound is nearly attained, with its bound: weights of rank one, all along the gain of the norm."""
    layer = build_language_model(LlamaConfig(**TEXT_SIZES)).layers[0].double()
    layer.post_attention_layernorm.weight.data = torch.full((32,), 7.0).double()
    along, hidden = torch.ones(32).double() / math.sqrt(32), torch.eye(48)[0].double()
    for name, size in {"gate_proj": 2.0, "up_proj": 3.0}.items():
        getattr(layer.mlp, name).weight.data = size * torch.outer(hidden, along)
    layer.mlp.down_proj.weight.data = 5.0 * torch.outer(along, hidden)
    normed = layer.post_attention_layernorm(torch.ones(1, 32).double())
    return FfnBound.of(layer), float(layer.mlp(normed).norm())


@torch.no_grad()
def test_the_bound_is_sharp_and_needs_each_factor():
    bound, added = attained()
    assert 0.999 < added / bound.anywhere <= 1
    one = Affine(1.0)
    for dropped in (
        {"gate": one},
        {"up": one},
        {"down": one},
        {"largest_input": math.sqrt(32)},
        {"largest_input": 7.0},
    ):
        assert replace(bound, **dropped).anywhere < added, dropped


@every_family
@torch.no_grad()
def test_attention_never_gives_more_than_its_bound(family):
    model = build_language_model(FAMILIES[family]()).double()
    for seed in range(20):
        layer = random_layer(family, seed)
        states = torch.randn(2, 9, 32).double() * 10.0 ** torch.empty(2, 9, 1).uniform_(-3, 3)
        positions = model.rotary_emb(states, torch.arange(9)[None])
        normed = layer.input_layernorm(states)
        given = layer.self_attn(hidden_states=normed, position_embeddings=positions, attention_mask=None)[0]
        assert (given.norm(dim=-1) <= attention_bound(layer) * (1 + 1e-6)).all(), seed


@torch.no_grad()
def test_the_bound_of_attention_is_sharp():
    """One token: attention is its value. The value weight of all heads is along one direction, as is the output's."""
    layer = build_language_model(LlamaConfig(**TEXT_SIZES)).layers[0].double()
    along = torch.ones(32).double() / math.sqrt(32)
    layer.self_attn.v_proj.weight.data = 2.0 * torch.outer(torch.ones(16).double(), along)
    layer.self_attn.o_proj.weight.data = 3.0 * torch.outer(along, along)
    positions = torch.ones(1, 1, 8).double(), torch.zeros(1, 1, 8).double()
    states = layer.input_layernorm(torch.ones(1, 1, 32).double())
    given = layer.self_attn(hidden_states=states, position_embeddings=positions, attention_mask=None)[0]
    assert float(given.norm()) == pytest.approx(attention_bound(layer), rel=1e-5)


def test_gains_are_the_norms_of_the_blocks_of_the_jacobian():
    torch.manual_seed(0)
    mix, weight = torch.randn(6, 6).double(), torch.randn(4, 4).double()

    def function(states):
        return torch.tanh(mix @ states @ weight) + states**2

    points = torch.randn(2, 6, 4).double()
    inside, outside = torch.zeros(2, 6, 1).double(), torch.zeros(2, 6, 1).double()
    inside[:, :2], outside[:, 3:] = 1, 1
    found = largest_gain(function, points, torch.ones_like(points), inside, outside, (1, 2), 200)
    for point, gain in zip(points, found, strict=True):
        jacobian = torch.autograd.functional.jacobian(function, point)[3:, :, :2]
        assert float(gain) == pytest.approx(float(torch.linalg.matrix_norm(jacobian.reshape(12, 8), 2)), rel=1e-4)
    nothing = largest_gain(lambda states: 0 * states, points, points, inside, outside, (1, 2), 3)
    assert nothing.tolist() == [0, 0]


def test_what_has_no_bound_is_named():
    model = build_language_model(LlamaConfig(**TEXT_SIZES, hidden_act="gelu"))
    assert "hidden_act 'gelu'" in why_unbounded(model.config, model.layers)
    model = small_model().model.language_model
    assert why_unbounded(model.config, model.layers) is None
    model.layers[1].mlp.up_proj = nn.Identity()
    assert "Layer 1 has no up_proj" in why_unbounded(model.config, model.layers)
