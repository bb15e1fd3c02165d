import dataclasses

import pytest
import torch

from llava_skip import SkipConfig
from llava_skip.per_sample import PER_SAMPLE
from tests.support.small_models import ARCHITECTURES, SKIP, mixed_samples, small_model
from train.data import collate, collate_counted, collate_flat
from train.data.dataset import COUNTED

VARIANTS = {name: {"architecture": name} for name in ARCHITECTURES}
VARIANTS["text does not see skipped"] = {"skip": dataclasses.replace(SKIP, text_sees_skipped=False)}
VARIANTS["every layer but one"] = {"skip": SkipConfig(5, 7, layers=(0, 2))}


def samples_of(model):
    samples = []
    for sample in mixed_samples(model):
        ids = sample.input_ids.tolist()
        # Every second text token is supervised, also the first one, which no token predicts.
        labels = [token if token != 90 and index % 2 == 0 else -100 for index, token in enumerate(ids)]
        entry = {"input_ids": ids, "labels": labels, "truncated": 0, "unsupervised": False, "unread": 0}
        if sample.pixel_values is not None:
            entry["pixel_values"] = sample.pixel_values
        if sample.crop_counts is not None:
            entry["crop_counts"] = sample.crop_counts
        samples.append(entry)
    return samples


def loss_and_gradients(model, batch):
    model.zero_grad()
    batch = {name: value for name, value in batch.items() if name not in (*COUNTED, "record_ids")}
    loss = model(**batch).loss
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager", PER_SAMPLE])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_a_padded_batch(variant, attention):
    model = small_model(**VARIANTS[variant]).train()
    model.set_attn_implementation(attention)
    samples = samples_of(model)
    flat = collate_counted(samples, collate_flat, model.config)
    assert flat["input_ids"].shape[0] == 1 and (flat["position_ids"] == 0).sum() == len(samples)
    padded_loss, padded = loss_and_gradients(model, collate(samples, 0))
    flat_loss, found = loss_and_gradients(model, flat)
    assert torch.allclose(padded_loss, flat_loss, atol=1e-5)
    assert padded.keys() == found.keys()
    for name, gradient in padded.items():
        scale = gradient.abs().max().clamp(min=1.0)
        assert (gradient - found[name]).abs().max() <= 1e-5 * scale, name


def test_a_sample_does_not_attend_to_another():
    model = small_model().train()
    one, two, three, _ = samples_of(model)
    other = {**one, "input_ids": [token if token == 90 else 5 for token in one["input_ids"]], "labels": one["labels"]}
    quiet = {**one, "labels": [-100] * len(one["labels"])}
    loss, _ = loss_and_gradients(model, collate_flat([quiet, two, three]))
    changed, _ = loss_and_gradients(model, collate_flat([{**other, "labels": quiet["labels"]}, two, three]))
    assert torch.allclose(loss, changed, atol=1e-6)
    without_positions = collate_flat([quiet, two, three])
    del without_positions["position_ids"]
    leaked, _ = loss_and_gradients(model, without_positions)
    assert not torch.allclose(loss, leaked, atol=1e-4)  # the positions separate the samples
