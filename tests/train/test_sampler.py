import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from PIL import Image
from torch.utils.data import DataLoader

from llava_skip import LlavaSkipProcessor
from tests.support.conversations import byte_tokenizer
from tests.support.records import record, stored
from tests.support.small_models import small_config
from train.data import ConversationDataset, sample_lengths
from train.data.sampler import ModalityLengthSampler, length_order, modality_order


def lengths_of(images=70, text=41, seed=0):
    chance = np.random.default_rng(seed)
    signed = np.concatenate([chance.integers(100, 900, images), -chance.integers(5, 600, text)])
    return signed[chance.permutation(len(signed))].astype(np.int32)


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("images", "text"), [(70, 41), (64, 32), (5, 3), (70, 0), (0, 41), (1, 1)])
def test_every_sample_comes_once(images, text):
    order = modality_order(lengths_of(images, text), 4, 2, generator())
    assert sorted(order) == list(range(images + text))


def test_steps_have_one_modality_but_the_last():
    lengths, size = lengths_of(), 8
    order = modality_order(lengths, 4, 2, generator())
    steps = [np.sign(lengths[order[start : start + size]]) for start in range(0, len(order), size)]
    whole = (70 // size) + (41 // size)  # 70 and 41 leave 6 and 1, which end the epoch together, in their old order
    assert all(len(set(step)) == 1 for step in steps[:whole]) and {tuple(set(s)) for s in steps[:whole]} == {
        (1,),
        (-1,),
    }
    assert order[-7:] == sorted(order[-7:])
    assert [sum(lengths[order[-7:]] > 0), sum(lengths[order[-7:]] < 0)] == [6, 1]


def test_the_last_step_of_a_modality_waits_even_if_it_is_whole():
    lengths = lengths_of(16, 16)
    order = modality_order(lengths, 4, 2, generator())
    assert len({*np.sign(lengths[order[:8]])}) == len({*np.sign(lengths[order[8:16]])}) == 1
    assert order[16:] == sorted(order[16:])


def test_batches_of_a_step_are_about_equally_long():
    lengths = np.abs(lengths_of(512, 0))
    order = np.array(length_order(lengths, 8, 4, generator()))
    sums = lengths[order].reshape(-1, 4, 8).sum(axis=2)
    shuffled = lengths[np.random.default_rng(0).permutation(512)].reshape(-1, 4, 8).sum(axis=2)
    assert np.ptp(sums, axis=1).mean() < 0.1 * np.ptp(shuffled, axis=1).mean()


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([9, 8, 7, 6, 5, 4, 3, 2], [[9, 6, 5, 2], [8, 7, 4, 3]]),  # greedy, the smaller sum first
        ([10, 1, 1, 1], [[10, 1], [1, 1]]),  # a full batch takes no more
        ([5, 4, 3], [[5, 3], [4]]),  # not divisible: shared in turn
    ],
)
def test_samples_are_dealt_to_the_batches_of_a_step(lengths, expected):
    order = length_order(np.array(lengths), len(lengths) // 2 + len(lengths) % 2, 2, generator())
    found = [lengths[index] for index in order]
    assert found == [length for batch in expected for length in batch]


def batches_of(rank, processes, epoch=0, accumulation=1):
    lengths = lengths_of()
    sampler = ModalityLengthSampler(lengths, 4, processes * accumulation, seed=7)
    loader = DataLoader(range(len(lengths)), 4, sampler=sampler, collate_fn=list)
    if processes > 1:
        loader = prepare_data_loader(loader, num_processes=processes, process_index=rank, put_on_device=False)
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    else:
        sampler.set_epoch(epoch)
    return loader


def test_processes_take_the_batches_of_a_step_in_turn(monkeypatch):
    monkeypatch.setattr("accelerate.data_loader.synchronize_rng_states", lambda *args, **kwargs: None)
    alone = list(modality_order(lengths_of(), 4, 2, generator(7)))
    shares = [list(batches_of(rank, 2)) for rank in range(2)]
    for step in range(10):
        assert shares[0][step] + shares[1][step] == alone[step * 8 : step * 8 + 8]


def test_epochs_differ_and_repeat():
    first, again, second = (list(batches_of(0, 1, epoch)) for epoch in (0, 0, 1))
    assert first == again and first != second


def test_a_resumed_epoch_goes_on_where_it_was(monkeypatch):
    monkeypatch.setattr("accelerate.data_loader.synchronize_rng_states", lambda *args, **kwargs: None)
    whole = list(batches_of(1, 2, epoch=3))
    assert list(skip_first_batches(batches_of(1, 2, epoch=3), 5)) == whole[5:]


def test_lengths_equal_those_of_encoded_samples(images, processor):
    rows = [record(), record((), "Just text"), record(("a.png", "b.png"), text="<image> or <image>?", answer="x" * 90)]
    records = stored(rows, images)
    lengths = sample_lengths(records, processor, 100, 0)
    samples = ConversationDataset(records, processor, 2048)
    assert lengths.tolist() == [min(100, len(samples[0]["input_ids"])), -min(100, len(samples[1]["input_ids"])), 100]
    assert sample_lengths(records, processor, 2048, 0).tolist()[2] == len(samples[2]["input_ids"])


def test_lengths_of_images_with_tiles(images):
    config = small_config(architecture="llava-hd", vocab_size=400)
    config.image_token_index = 3
    hd = LlavaSkipProcessor.for_config(config, byte_tokenizer(), "v1")
    records = stored([record(("a.png",)), record(("b.png",))], images)
    Image.new("RGB", (64, 16)).save(images / "b.png")
    samples = ConversationDataset(records, hd, 2048)
    expected = [len(samples[i]["input_ids"]) for i in range(2)]
    assert sample_lengths(records, hd, 2048, 0).tolist() == expected and expected[0] != expected[1]
