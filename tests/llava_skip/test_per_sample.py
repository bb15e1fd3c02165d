"""Samples one after the other in one row, each attended to by itself."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from llava_skip.counts import lengths_in_row
from llava_skip.per_sample import PER_SAMPLE, arguments_of_row, attend_per_sample, set_attention_per_sample
from llava_skip.reduction.config import ReductionConfig
from tests.support.device_reads import device_reads
from tests.support.small_models import SKIP, Sample, small_model
from train.data import collate_counted, collate_flat

KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Attention(TorchDispatchMode):
    """Queries times keys of every call of torch's kernel, and the largest table with a row for each token."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.work, self.largest = tokens, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket is KERNEL:
            self.work += args[0].shape[2] * args[1].shape[2]
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and min(tensor.shape[-2:]) >= self.tokens:
                self.largest = max(self.largest, tensor.nbytes)
        return result


def batch_of(model, texts=(60, 90, 40)):
    samples = []
    for number, words in enumerate(texts):
        sample = Sample(model, 1, (words, words), seed=number)
        ids = sample.input_ids.tolist()
        labels = [token if token != 90 else -100 for token in ids]
        given = {"input_ids": ids, "labels": labels, "truncated": 0, "unsupervised": False, "unread": 0}
        samples.append(given | {"pixel_values": sample.pixel_values})
    batch = collate_counted(samples, collate_flat, model.config)
    names = ("input_ids", "labels", "position_ids", "pixel_values", "counts")
    return {name: batch[name] for name in names}, [len(sample["input_ids"]) for sample in samples]


@pytest.mark.parametrize("skip", [SKIP, None], ids=["skipping", "dense"])
def test_work_is_that_of_the_samples_and_no_mask_of_the_row_exists(skip):
    model = small_model(skip).train()
    batch, lengths = batch_of(model)
    seen = {}
    for name in ("sdpa", PER_SAMPLE):
        model.model.language_model.set_attn_implementation(name)
        with Attention(sum(lengths)) as seen[name]:
            model(**batch).loss.backward()
    layers = model.config.text_config.num_hidden_layers
    spared = seen["sdpa"].work - seen[PER_SAMPLE].work  # the tower's is in both
    assert spared == layers * (sum(lengths) ** 2 - sum(length**2 for length in lengths))
    assert seen[PER_SAMPLE].largest == 0 and seen["sdpa"].largest >= sum(lengths) ** 2


def test_lengths_that_were_not_counted_are_read_from_the_positions():
    model = small_model().train()
    set_attention_per_sample(model)
    batch, lengths = batch_of(model)
    assert batch["counts"].sequences == lengths_in_row(batch["position_ids"]) == tuple(lengths)
    with device_reads() as reads:
        counted = model(**batch).loss
    assert reads.of("llava_skip") == reads.of("transformers") == 0
    del batch["counts"]
    assert torch.equal(counted, model(**batch).loss)


def test_a_row_is_the_mean_of_its_samples_in_evaluation_too():
    model = small_model()
    expected = model(**batch_of(model)[0], use_cache=False).logits
    set_attention_per_sample(model)
    assert torch.allclose(model(**batch_of(model)[0], use_cache=False).logits, expected, atol=1e-5)


def test_a_batch_with_padding_and_a_prompt_go_the_way_of_sdpa():
    model = small_model()
    sample = Sample(model, 1, (4, 5), seed=1).alone()
    padded = dict(sample)
    padded["input_ids"] = torch.cat([sample["input_ids"], sample["input_ids"]])
    padded["attention_mask"] = torch.ones_like(padded["input_ids"])
    padded["attention_mask"][1, -2:] = 0
    padded["pixel_values"] = torch.cat([sample["pixel_values"]] * 2)
    expected = model(**padded).logits, model.generate(**sample, max_new_tokens=3, do_sample=False)
    set_attention_per_sample(model)
    assert torch.equal(model(**padded).logits, expected[0])
    assert torch.equal(model.generate(**sample, max_new_tokens=3, do_sample=False), expected[1])


def test_the_last_token_of_a_row_sees_its_own_sample_alone():
    model = small_model()
    batch, _ = batch_of(model)
    del batch["labels"], batch["counts"]
    expected = model(**batch, use_cache=False, logits_to_keep=1).logits
    set_attention_per_sample(model)
    assert torch.allclose(model(**batch, use_cache=False, logits_to_keep=1).logits, expected, atol=1e-5)


def test_a_row_in_which_nothing_is_supervised_has_the_loss_0():
    model = small_model().train()
    set_attention_per_sample(model)
    batch, _ = batch_of(model)
    batch["labels"][:] = -100
    del batch["counts"]
    loss = model(**batch).loss
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("method", ["shortv:2", "fastervlm:8"])
def test_rivals_that_can_be_trained_in_one_row(method):
    model = small_model(None).train()
    model.set_reduction(ReductionConfig.parse(method))
    batch, _ = batch_of(model)
    expected = model(**batch).loss
    set_attention_per_sample(model)
    assert torch.allclose(model(**batch).loss, expected, atol=1e-6)


def flash(module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, **kwargs):
    """Stands in for flash attention; without transformers' arguments it would look for samples in the positions."""
    assert attention_mask is None and cu_seq_lens_q.dtype == torch.int32
    lengths = tuple(cu_seq_lens_q.diff().tolist())
    assert max_length_q == max(lengths)
    return attend_per_sample(module, query, key, value, None, lengths)


def test_flash_attention_is_told_where_samples_begin():
    AttentionInterface.register("flash_stand_in", flash)
    AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)
    model = small_model().train()
    batch, _ = batch_of(model)
    expected = model(**batch).loss
    model.model.language_model.config._attn_implementation = "flash_stand_in"
    assert torch.allclose(model(**batch).loss, expected, atol=1e-6)
    with device_reads() as reads:
        model(**batch)
    assert sum(reads.values()) == model.config.text_config.num_hidden_layers  # those of the stand-in itself


def test_a_cut_ends_what_was_known_of_the_row():
    model = small_model(None)
    model.set_reduction(ReductionConfig.parse("pyramiddrop"))
    inputs = Sample(model, 1, (9, 9), seed=1).alone()
    del inputs["attention_mask"]
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        set_attention_per_sample(model)
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, expected)


def test_several_samples_with_the_same_positions_are_no_row():
    text = small_model().config.text_config
    text._attn_implementation = "flash_attention_2"
    positions = torch.arange(7)[None]
    assert arguments_of_row(text, 2, None, None, positions, None) == {}
    assert arguments_of_row(text, 1, None, None, positions, None)["max_length_q"] == 7
