"""The counts of a batch, made where the batch is made."""

import torch

from llava_skip.counts import count_batch
from tests.support.small_models import Sample, mixed_samples, small_model
from train.data import collate, collate_counted, collate_flat


def test_the_collator_counts_what_the_model_counts():
    model = small_model()
    samples = [
        {"input_ids": s.input_ids.tolist(), "labels": [-100, *s.input_ids.tolist()[1:]]} | flags(s)
        for s in mixed_samples(model)
    ]
    batch = collate_counted(samples, lambda samples: collate(samples, pad_token_id=0), model.config)
    counts = batch["counts"]
    assert counts.shape == tuple(batch["input_ids"].shape)
    assert counts.real == sum(len(sample["input_ids"]) for sample in samples)
    assert counts.padding == counts.tokens - counts.real > 0
    assert counts.image == counts.found == 5 * model.config.image_seq_length
    assert counts.ffn == counts.real - 5 * model.config.skip_config.num_skipping
    assert counts.supervised == sum(len(sample["input_ids"]) - 1 for sample in samples)
    assert (counts.wrong, counts.cut, counts.first) == (0, 0, 0)


def flags(sample: Sample) -> dict:
    pixels = {} if sample.pixel_values is None else {"pixel_values": sample.pixel_values}
    return {"truncated": 0, "unsupervised": False, "unread": False} | pixels


def test_samples_in_one_sequence_are_counted_as_well():
    model = small_model()
    samples = [
        {"input_ids": s.input_ids.tolist(), "labels": s.input_ids.tolist()} | flags(s) for s in mixed_samples(model)
    ]
    batch = collate_counted(samples, collate_flat, model.config)
    counted = model.train()(**arguments(batch), counts=batch["counts"]).loss
    assert torch.equal(counted, model(**arguments(batch)).loss)
    assert batch["counts"] == count_batch(model.config, batch) and batch["counts"].padding == 0


def arguments(batch: dict) -> dict:
    return {name: batch[name] for name in ("input_ids", "labels", "position_ids", "pixel_values")}
