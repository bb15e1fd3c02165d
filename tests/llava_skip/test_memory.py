"""What a model's states and activations take, by formula, against what autograd saves and torch counts."""

from itertools import product

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from llava_skip import preset_config
from llava_skip.decoder import build_language_model
from llava_skip.memory import Zero, activations, cache_token_bytes, layer_bytes, states
from llava_skip.routing import Route
from llava_skip.step_flops import Load
from tests.llava_skip.test_step_flops import STAGES, labelled
from tests.support.small_models import Sample, mixed_samples, small_model
from train.recipe.parts import choose_trained, freeze_unused


class Saved:
    """Bytes of the tensors that autograd saves, each storage once, without parameters."""

    def __init__(self, model):
        self.known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.bytes, self.tensors = 0, []

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.tensors.append(tensor)  # memory that is freed could be given to another tensor
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


SIZES = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}


def saved_by_decoder(kind, layers, dtype, ffn_tokens, masked):
    model = build_language_model(kind(**SIZES, num_hidden_layers=layers, num_key_value_heads=2)).to(dtype).train()
    states = torch.randn(2, 20, 32, dtype=dtype, requires_grad=True)
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril() if masked else None
    route = Route(ffn_tokens=None if ffn_tokens is None else torch.arange(ffn_tokens))
    with Saved(model) as saved:
        model(inputs_embeds=states, attention_mask=mask, use_cache=False, route=route)
    return saved.bytes, model.config


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize(
    ("dtype", "ffn_tokens", "masked"), product([torch.float32, torch.bfloat16], [None, 25], [False, True])
)
def test_the_formula_of_a_layer_equals_what_autograd_saves(kind, dtype, ffn_tokens, masked):
    (two, config), (one, _) = (saved_by_decoder(kind, layers, dtype, ffn_tokens, masked) for layers in (2, 1))
    load = Load(2, 0, 0, 40, 2 * 20**2, ffn_tokens or 40, 0, gathered=ffn_tokens is not None)
    assert two - one == layer_bytes(config, load, dtype.itemsize, masked)


CASES = [
    ("llava", "stage 2", False, 0.01),
    ("sv-llava", "all", False, 0.03),
    ("sv-llava-hd", "stage 2", False, 0.03),
    ("sv-cos", "all", False, 0.02),
    ("llava", "all", True, 0.06),  # what remains is so little that the batch's own numbers and masks show
    ("sv-cos", "stage 2", True, 0.11),
]


@pytest.mark.parametrize(("architecture", "stage", "checkpointing", "near"), CASES)
def test_activations_are_near_what_autograd_saves_of_a_step(architecture, stage, checkpointing, near):
    wide = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32, "vocab_size": 300}
    model = small_model(architecture=architecture, **wide).train()
    choose_trained(model, STAGES[stage])
    freeze_unused(model, model.config)
    if checkpointing:
        model.activation_checkpointing_enable()
    hd = model.model.front_end.cuts_tiles
    samples = [Sample(model, 1, (3, 9), seed=3), Sample(model, 1, (5, 4), seed=3)] if hd else mixed_samples(model)
    inputs, load = labelled(model, samples)
    with Saved(model) as saved:
        model(**inputs, use_cache=False)
    found = activations(model.config, load, stage == "all", True, checkpointing, element=4)
    logits = found.logits - 4 * load.head_tokens * model.config.text_config.vocab_size  # their gradient comes later
    assert saved.bytes == pytest.approx(found.decoder + found.vision + logits, rel=near)


def test_saved_activations_of_the_paper_sized_models():
    """Of a layer, with 100 tokens of text and no padding: the shares that were measured at these widths."""
    shares = {}
    for preset, dense in (("sv-llava-100", "llava"), ("sv-llava-256", "llava"), ("sv-llava-hd", "llava-hd"),
                          ("sv-cos", "cos")):  # fmt: skip
        found = []
        for name in (preset, dense):
            config = preset_config(name, "llama3-8b")
            tokens, skip = config.image_seq_length + 100, config.skip_config
            ffn = tokens - (skip.num_skipping if skip else 0)
            load = Load(1, 1, config.most_crops, tokens, tokens**2, ffn, 50, gathered=skip is not None)
            found.append(layer_bytes(config.text_config, load, masked=False))
        shares[preset] = found[0] / found[1]
    expected = {"sv-llava-100": 0.37, "sv-llava-256": 0.67, "sv-llava-hd": 0.29, "sv-cos": 0.33}
    assert shares == pytest.approx(expected, abs=0.01)


def test_states_under_zero():
    """Bytes of 1000 parameters of which 600 are trainable, on 4 processes."""
    plain = states(1000, 600, 100, Zero(), 4)
    assert (plain.weights, plain.gradients, plain.optimizer) == (400 * 2 + 600 * 4, 600 * 4, 600 * 8)
    second = states(1000, 600, 100, Zero(2), 4)
    assert (second.weights, second.gradients, second.optimizer, second.host) == (2000, 300, 1800, 0)
    third = states(1000, 600, 100, Zero(3), 4)
    assert (third.weights, third.gradients, third.optimizer) == (500 + 200, 300, 1800)
    assert third.total + third.update == 700 + 300 + 1800 + 600
    second = states(1000, 600, 100, Zero(2, offload_optimizer=True), 4)
    assert (second.total, second.host) == (2000, 150 * 16)
    third = states(1000, 600, 100, Zero(3, offload_optimizer=True, offload_weights=True), 4)
    assert (third.total, third.host) == (200, 150 * 16 + 500)
    assert states(1000, 600, 100, Zero(1), 4).gradients == states(1000, 600, 100, Zero(0), 4).gradients == 1200
    assert states(1000, 600, 100, Zero(0), 4).optimizer == 7200


def test_bytes_of_a_token_in_the_cache():
    assert cache_token_bytes(preset_config("llava", "llama3-8b").text_config) == 32 * 2 * 8 * 128 * 2
