"""Rival methods as configurations: text and JSON forms, refusals, the cost, and what every selection must hold."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig

from llava_skip import LlavaSkipConfig, LlavaSkipForConditionalGeneration
from llava_skip.flops import image_cost, prefill_flops
from llava_skip.presets import SIZES
from llava_skip.reduction import ReductionConfig, get_reduction, reduction_names
from llava_skip_base.errors import UserError
from tests.support.small_models import batch_of, mixed_samples, real_tokens, small_config, small_model


@pytest.mark.parametrize(
    "text", ["random:64", "random:64,seed=3", "vispruner:64,ratio=0.75", "hiprune:9,alpha=0.2,object_layer=3"]
)
def test_text_and_json_forms_are_inverse(text):
    reduction = ReductionConfig.parse(text)
    assert str(reduction) == text and ReductionConfig.parse(f" {text} ") == reduction
    assert ReductionConfig.from_dict(reduction.to_dict()) == reduction


def test_an_option_at_its_default_is_as_if_left_out():
    assert ReductionConfig.parse("random:64,seed=0") == ReductionConfig.parse("random:64")
    assert ReductionConfig.parse("random:64")["seed"] == 0


@pytest.mark.parametrize(
    "text, message",
    [
        ("radnom:64", "the method is 'radnom'; known: random"),
        ("random", "random needs the number of tokens: give METHOD:TOKENS"),
        ("random:", "reduction is 'random:'; it must be METHOD:TOKENS"),
        ("random:0", "tokens is 0; it must be a whole number from 1"),
        ("random:-3", "with '-3'; write METHOD:TOKENS"),
        ("random:3,4", "with '4'; write"),
        ("random:3,seed=1,seed=2", "with 'seed=2'"),
        ("random:3,seed=x", "seed is 'x'; it must be a whole number from 0"),
        ("random:3,seed=1+2", r"seed is '1\+2'; it must be a whole number"),
        ("random:3,seed=1.5", "seed is '1.5'"),
        ("random:3,sede=1", "random does not take sede; its options are seed"),
        (":3", "reduction is ':3'; it must be METHOD"),
    ],
)
def test_a_mistake_in_the_text_is_named(text, message):
    with pytest.raises(UserError, match=message):
        ReductionConfig.parse(text)


def reduced(text: str, architecture: str = "llava"):
    model = small_model(architecture=architecture)
    model.set_reduction(ReductionConfig.parse(text))
    return model


@pytest.mark.parametrize(
    "architecture, entry, message",
    [
        ("sv-llava", {"method": "random", "tokens": 4}, "skip and reduction random:4 are both set"),
        ("llava", {"method": "random", "tokens": 17}, "keeps 17 tokens, but the image has 16: give at most 16"),
        ("llava-hd", {"method": "random", "tokens": 17}, "but the crop has 16"),
        ("cos", {"method": "random", "tokens": 13}, "but the image has 12"),
        ("cos", {"method": "fastervlm", "tokens": 4}, "the tokens of the front end 'cos' are none"),
        ("cos", {"method": "downsample", "tokens": 4}, "the tokens of the front end 'cos' are none"),
        ("llava", {"method": "visionzip", "tokens": 18}, "give at most 17"),
        ("llava", {"method": "hiprune", "tokens": 4, "object_layer": 3}, "the features come out of layer 2"),
        ("llava", {"tokens": 4}, "reduction lacks 'method'"),
        ("llava", {"method": ["random"], "tokens": 4}, "it must be a name"),
        ("llava", {"method": "random", "tokens": "4"}, "tokens is '4'"),
    ],
)
def test_a_reduction_that_does_not_fit_the_model_is_refused(architecture, entry, message):
    fields = small_config(architecture=architecture).to_dict()
    with pytest.raises(UserError, match=message):
        LlavaSkipConfig.from_dict(fields | {"reduction": entry})


def test_the_class_token_among_the_patches_is_refused():
    fields = small_config(architecture="llava").to_dict() | {"vision_feature_select_strategy": "full"}
    with pytest.raises(UserError, match="reduction random:4 reads the class token apart"):
        LlavaSkipConfig.from_dict(fields | {"reduction": {"method": "random", "tokens": 4}})


METHODS = [
    (name, architecture)
    for name in reduction_names()
    for architecture in ("llava", "llava-hd", "cos")
    if not get_reduction(name).in_decoder and not (get_reduction(name).reads_patches and architecture == "cos")
]
# Crops are images to the tower: two methods stand for all with several of them.
EACH = pytest.mark.parametrize(
    "name, architecture", [pair for pair in METHODS if pair[1] != "llava-hd" or pair[0] in ("random", "visionzip")]
)


@EACH
@torch.no_grad()
def test_a_sample_in_a_mixed_padded_batch_equals_the_sample_alone(name, architecture):
    model = reduced(f"{name}:5", architecture)
    samples = mixed_samples(model)
    for side in ("right", "left"):
        batch = batch_of(samples, side)
        together = model(**batch).logits
        for index, sample in enumerate(samples):
            alone = model(**sample.alone()).logits[0]
            torch.testing.assert_close(real_tokens(together, batch, index), alone, atol=1e-5, rtol=1e-5)


@EACH
@torch.no_grad()
def test_counted_flops_equal_the_formula(name, architecture):
    model = reduced(f"{name}:5", architecture)
    model.set_attn_implementation("eager")  # torch does not count its fused kernel for CPUs
    inputs = mixed_samples(model)[0].alone()
    encoded = model.model.encode_images(inputs.pop("pixel_values"), inputs.pop("crop_counts", None))
    crops = 1 if architecture != "llava-hd" else len(encoded[0]) // model.config.image_length(1)
    rule, length = model.config.reduction_config.rule, encoded[0].shape[0]
    layers = rule.layer_rows(model.config.reduction_config, model.config, crops)
    model.model.encode_images = lambda *_: encoded
    with FlopCounterMode(display=False) as counter:
        model(**inputs, pixel_values=torch.zeros(1), use_cache=False, logits_to_keep=1)
    text = inputs["input_ids"].shape[1] - length
    assert counter.get_total_flops() == prefill_flops(model.config.text_config, layers, text)
    if crops == model.config.most_crops:
        cost = image_cost(model.config, text)
        assert cost.prefill_flops == counter.get_total_flops()
        assert (cost.tokens, cost.attention_tokens, cost.ffn_tokens, cost.cache_tokens) == (length,) * 4


@EACH
def test_it_trains_and_is_saved_and_loaded(name, architecture, tmp_path):
    model = reduced(f"{name}:5", architecture)
    batch = batch_of(mixed_samples(model), "right")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] >= 90, -100)
    model.train()(**batch, labels=labels).loss.backward()
    reached = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    for part in ("patch_embedding", "encoder.layers.1.mlp.fc2", "multi_modal_projector", "embed_tokens"):
        assert any(part in parameter for parameter in reached), part
    model.eval().save_pretrained(tmp_path)
    loaded = LlavaSkipForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.config.reduction_config == model.config.reduction_config
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("architecture", ["llava", "llava-hd", "cos"])
@torch.no_grad()
def test_keeping_everything_equals_the_dense_model_to_the_bit(architecture):
    model = small_model(architecture=architecture)
    inputs = batch_of(mixed_samples(model), "left")
    dense = model(**inputs).logits
    # The class token's row and that of the others are no patches (docs/rivals.md).
    names = [name for name, fitting in METHODS if fitting == architecture and name not in ("visionzip", "prumerge+")]
    assert {"random", "grid", "divprune"} <= set(names)
    for name in names:
        model.set_reduction(ReductionConfig.parse(f"{name}:{model.config.visual_tokens(1)}"))
        assert torch.equal(model(**inputs).logits, dense), name


def test_without_a_reduction_the_configuration_is_as_before(tmp_path):
    model = small_model(architecture="llava")
    model.config.save_pretrained(tmp_path)
    assert "reduction" not in (tmp_path / "config.json").read_text()
    model.set_reduction(ReductionConfig.parse("random:5"))
    assert model.config.image_seq_length == 5 and model.model.config is model.config
    model.set_reduction(None)
    assert model.config.image_seq_length == 16


def test_no_choice_waits_for_the_device_or_costs_much_at_the_papers_size():
    """On the meta device there are no values: whatever reads one back from a GPU, such as `.item()`, fails there."""
    text = small_config(architecture="llava").text_config
    config = LlavaSkipConfig(vision_config=CLIPVisionConfig(**SIZES["vicuna-7b"]["vision"]), text_config=text)
    with torch.device("meta"):
        model = LlavaSkipForConditionalGeneration(config)
        pixels = torch.empty(2, 3, 336, 336)
    model.set_attn_implementation("eager")
    counted = {}
    for name in (None, *(name for name, architecture in METHODS if architecture == "llava")):
        model.set_reduction(None if name is None else ReductionConfig.parse(f"{name}:64"))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            assert model.model.encode_images(pixels).shape == (2, 576 if name is None else 64, text.hidden_size)
        counted[name] = counter.get_total_flops()
    share = {name: flops / counted[None] for name, flops in counted.items()}
    assert share.pop("downsample") < 0.12  # 65 of 577 tokens
    assert max(share.values()) < 1.04, share
