"""What a forward, its backward pass and `generate` read from the device: each read has the host wait for it."""

import pytest
import torch

from llava_skip.counts import count_batch
from tests.support.device_reads import DeviceReads, device_reads
from tests.support.small_models import IMAGE_TOKEN_ID, Sample, batch_of, mixed_samples, small_model


def read_by_the_model(reads: DeviceReads) -> int:
    """Reads of a forward, transformers' checks of masks included."""
    return sum(reads.values()) - reads.of("transformers/generation")


@pytest.fixture(params=["llava", "sv-llava", "sv-llava-hd", "sv-cos"], scope="module")
def model(request):
    return small_model(architecture=request.param)


@pytest.fixture(params=["padded", "full"])
def inputs(request, model):
    samples = mixed_samples(model)
    return batch_of(samples if request.param == "padded" else [Sample(model, 1, (3, 5), seed=1)] * 2, "left")


def labels_of(inputs: dict) -> torch.Tensor:
    return inputs["input_ids"].masked_fill(
        (inputs["input_ids"] >= IMAGE_TOKEN_ID) | ~inputs["attention_mask"].bool(), -100
    )


def train(model, inputs: dict) -> DeviceReads:
    model.train()
    with device_reads() as reads:
        model(**inputs, labels=labels_of(inputs)).loss.backward()
    model.eval().zero_grad()
    return reads


def test_a_training_step_reads_once_and_never_if_its_batch_was_counted(model, inputs):
    assert read_by_the_model(train(model, inputs)) == 1
    counts = count_batch(model.config, inputs | {"labels": labels_of(inputs)})
    assert read_by_the_model(train(model, inputs | {"counts": counts})) == 0


def test_checkpointed_layers_read_nothing_more(model, inputs, caplog):
    counts = count_batch(model.config, inputs | {"labels": labels_of(inputs)})
    model.gradient_checkpointing_enable()
    reads = train(model, inputs | {"counts": counts})
    model.gradient_checkpointing_disable()
    assert read_by_the_model(reads) == 0
    assert "incompatible with gradient checkpointing" not in caplog.text


@torch.no_grad()
def test_a_forward_without_a_cache_gives_none(model, inputs):
    outputs = model(**inputs, use_cache=False)
    assert outputs.past_key_values is None and "past_key_values" not in outputs


@torch.no_grad()
def test_a_prefill_reads_once_and_a_decode_step_never(model, inputs):
    with device_reads() as reads:
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    assert read_by_the_model(reads) == 1
    ids, mask = inputs["input_ids"][:, :1], inputs["attention_mask"]
    mask, padded = torch.cat([mask, torch.ones_like(ids)], dim=1), bool((mask == 0).any())
    with device_reads() as reads:
        model(input_ids=ids.clamp(max=80), attention_mask=mask, past_key_values=cache, padded=padded)
    assert read_by_the_model(reads) == 0


def test_generate_reads_once_before_the_tower_runs(model, inputs, monkeypatch):
    encode, read_before = model.model.encode_images, []

    def encoding(*args, **kwargs):
        read_before.append(read_by_the_model(reads))
        return encode(*args, **kwargs)

    monkeypatch.setattr(model.model, "encode_images", encoding)
    with device_reads() as reads:
        model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=1, pad_token_id=0)
    assert read_before == [1] and read_by_the_model(reads) == 1


def test_counts_of_beams_are_those_of_the_repeated_batch(model, inputs):
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    with device_reads() as reads:
        model.generate(**inputs, **options)
    assert reads.of("llava_skip") == 1


def test_counts_of_another_batch_are_not_taken(model, inputs):
    counts = count_batch(model.config, inputs)
    longer = {name: torch.cat([t, t], dim=0) for name, t in inputs.items()}
    torch.testing.assert_close(model(**longer, counts=counts).logits, model(**longer).logits, atol=0, rtol=0)


@pytest.mark.parametrize("counted", ["shift_labels", None], ids=["with them", "without labels"])
def test_counts_know_whether_labels_were_counted(model, inputs, counted):
    shifted = torch.nn.functional.pad(labels_of(inputs)[:, 1:], (0, 1), value=-100)
    counts = count_batch(model.config, inputs | ({counted: shifted} if counted else {}))
    assert counts.supervised == ((shifted != -100).sum() if counted else None)
    model.train()
    alone = model(**inputs, shift_labels=shifted).loss
    assert alone > 0 and torch.equal(model(**inputs, shift_labels=shifted, counts=counts).loss, alone)
    model.eval()


def test_counted_batches_give_the_same_loss_and_gradients(model, inputs):
    def step(**counted) -> list[torch.Tensor]:
        model.train().zero_grad()
        loss = model(**inputs, labels=labels_of(inputs), **counted).loss
        loss.backward()
        return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]

    counts = count_batch(model.config, inputs | {"labels": labels_of(inputs)})
    alone, counted = step(), step(counts=counts)
    model.eval().zero_grad()
    assert len(alone) == len(counted) > 20 and all(map(torch.equal, alone, counted))


def test_the_counter_sees_reads():
    numbers = torch.arange(6.0, requires_grad=True)
    with device_reads() as reads:
        numbers[numbers > 2].sum().backward()
        assert bool(numbers.sum() > 0)
        assert numbers.tolist()[0] == 0
    assert sum(reads.values()) == 4  # the index, its backward pass, the truth value, the list
