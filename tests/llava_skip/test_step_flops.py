"""The FLOPs of a training step by formula equal those that torch counts, forward and backward."""

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_skip.routing import skipped_tokens
from llava_skip.step_flops import Load, step_flops
from tests.support.small_models import ARCHITECTURES, Sample, batch_of, mixed_samples, small_model
from train.arguments import ModelArguments
from train.recipe.lora import add_lora
from train.recipe.parts import choose_trained, freeze_unused

PARTS = ("vision_tower", "multi_modal_projector", "summary", "language_model")
STAGES = {"all": PARTS, "stage 2": PARTS[1:], "stage 1": PARTS[1:3], "language model": PARTS[3:], "tower": PARTS[:1]}


def labelled(model, samples):
    """A batch with labels on its text, and what goes through the model with it."""
    inputs = batch_of(samples, "right")
    is_image = inputs["input_ids"] == model.config.image_token_id
    labels = inputs["input_ids"].masked_fill(is_image | ~inputs["attention_mask"].bool(), -100)
    labels[:, :2] = -100
    real, skip = int(inputs["attention_mask"].sum()), model.config.skip_config
    images = [sample for sample in samples if sample.pixel_values is not None]
    rows, columns = labels.shape
    counts = [sample.crop_counts for sample in images]
    crops = sum(sample.pixel_values.shape[0] for sample in images)
    first = int((labels[:, 1:] != -100).any(dim=0).to(int).argmax())  # no token before it reaches the head
    load = Load(
        samples=rows,
        images=crops if counts[0] is None else sum(len(count) for count in counts),
        crops=crops,
        tokens=rows * columns,
        pairs=rows * columns**2,
        ffn_tokens=real - (0 if skip is None else int(skipped_tokens(is_image, skip).sum())),
        head_tokens=int((labels[:, 1:] != -100).sum()),
        gathered=skip is not None or real < rows * columns,
        asking=rows * (columns - first),
    )
    return inputs | {"labels": labels}, load


def counted(model, inputs):
    """FLOPs of the forward and of the backward pass."""
    model.set_attn_implementation("eager")  # torch does not count its fused kernel for CPUs
    numbers = []
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            loss = model(**inputs, use_cache=False).loss
        numbers.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            loss.backward()
    return [*numbers, counter.get_total_flops()]


CASES = [(name, "stage 2", True) for name in ARCHITECTURES] + [
    ("llava", "all", False),
    ("sv-llava", "all", True),
    ("sv-llava", "language model", False),
    ("sv-llava", "tower", True),
    ("sv-llava-hd", "stage 1", False),
    ("sv-cos", "all", True),
    ("sv-cos", "stage 1", False),
]  # a trained tower under a frozen resampler alone is not exact: the first queries then have no gradient


@pytest.mark.parametrize(("architecture", "stage", "checkpointing"), CASES)
def test_the_formula_of_a_step_equals_what_torch_counts(architecture, stage, checkpointing):
    model = small_model(architecture=architecture).train()
    choose_trained(model, STAGES[stage])
    freeze_unused(model, model.config)
    if checkpointing:
        model.activation_checkpointing_enable()
    hd = model.model.front_end.cuts_tiles  # images of one number of crops, from which the merge follows
    samples = [Sample(model, 1, (3, 9), seed=3), Sample(model, 1, (5, 4), seed=3)] if hd else mixed_samples(model)
    inputs, load = labelled(model, samples)
    forward, backward = counted(model, inputs)
    expected = step_flops(model.config, load, STAGES[stage], checkpointing)
    assert forward == expected.forward
    assert backward == expected.backward + expected.recomputed


def test_an_unpadded_dense_batch_does_not_repeat_the_last_product_of_a_layer():
    model = small_model(architecture="llava").train()
    model.activation_checkpointing_enable()
    inputs, load = labelled(model, [Sample(model, 1, (3, 5), seed=1)])
    assert not load.gathered
    expected = step_flops(model.config, load, PARTS, True)
    assert counted(model, inputs)[1] == expected.backward + expected.recomputed


@pytest.mark.parametrize("checkpointing", [False, True])
def test_factors_of_lora_are_counted(checkpointing):
    model = small_model(architecture="sv-llava").train()
    inputs, load = labelled(model, mixed_samples(model))
    arguments = ModelArguments(lora_enable=True, lora_r=3, lora_dropout=0.0, train_parts=list(PARTS[1:]))
    choose_trained(model, PARTS[1:])
    adapted = add_lora(model, arguments)
    freeze_unused(adapted, model.config)
    if checkpointing:
        model.activation_checkpointing_enable()
    forward, backward = counted(adapted.base_model.model, inputs)
    expected = step_flops(model.config, load, PARTS[1:], checkpointing, lora_rank=3)
    assert forward == expected.forward
    assert backward == pytest.approx(expected.backward + expected.recomputed, rel=0.01)


def test_checkpointing_does_not_run_a_frozen_tower_again():
    backward = []
    for checkpointing in (False, True):
        model = small_model(architecture="llava").train()
        choose_trained(model, PARTS[1:])
        if checkpointing:
            model.activation_checkpointing_enable()
        seen = []
        model.model.vision_tower.encoder.layers[0].mlp.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        inputs, _ = labelled(model, mixed_samples(model))
        model(**inputs, use_cache=False).loss.backward()
        backward.append(len(seen))
        assert {name for name, p in model.named_parameters() if p.grad is None} == {
            name for name, _ in model.named_parameters() if "vision_tower" in name
        }
    assert backward == [1, 1]
