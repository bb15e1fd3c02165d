"""Batches of a fixed number of tokens: what is in them, how processes share them, and what is refused."""

import dataclasses
import json
import math
import re
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader
from transformers import MistralConfig

from llava_skip.per_sample import PER_SAMPLE, set_attention_per_sample
from llava_skip_base.errors import UserError
from tests.support.interrupted import launch_and_wait, outcome, write_inputs
from tests.support.records import write_set
from tests.support.runs import train
from tests.support.small_models import SKIP, small_config
from train.data.packing import Packed, PackSampler, collate_packs, pack
from train.recipe.packing import attends_per_sample, check_packing
from train.resilience.layout import Layout
from train.run import check, parse
from train.train import main


def lengths_of(number=2000, longest=2048, seed=0):
    """Lengths as those of conversations: most are short, some are cut to the longest."""
    drawn = np.random.default_rng(seed).lognormal(5.5, 0.8, number)
    return drawn.clip(20, longest).astype(np.int64)


@pytest.mark.parametrize("most", [2048, 8192])
@pytest.mark.parametrize("processes", [1, 8])
def test_batches_are_at_least_95_percent_full(most, processes):
    lengths = lengths_of()
    sampler = PackSampler(lengths, most, processes, seed=1)
    packs = list(sampler)
    assert sampler.filled == lengths.sum() / most / len(packs) >= 0.95
    assert len(packs) == len(sampler) and len(packs) % processes == 0
    assert max(sum(lengths[list(members)]) for members in packs) <= most
    assert sorted(chain(*packs)) == list(range(len(lengths)))
    assert str(sampler).endswith(
        f"of at most {most:,} tokens an epoch, {sampler.filled:.1%} filled, {2000 / len(packs):.1f} samples in each"
    )


def members(numbers):
    """The samples of each batch."""
    return [np.flatnonzero(numbers == number).tolist() for number in range(numbers.max() + 1)]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([7, 6, 4, 3], [[7, 3], [6, 4]]),  # each into the batch that it fills best, not the first one that has room
        ([10, 10], [[10], [10]]),
        ([5, 5, 5], [[5, 5], [5]]),
    ],
)
def test_best_fit(lengths, expected):
    packs = members(pack(np.array(lengths), 10, 1))
    assert [[lengths[index] for index in samples] for samples in packs] == expected


@pytest.mark.parametrize(("samples", "processes"), [(9, 4), (9, 9), (5, 3), (1, 1)])
def test_batches_are_divided_until_each_process_has_as_many(samples, processes):
    packs = members(pack(np.full(samples, 2), 100, processes))
    assert len(packs) == processes and sorted(chain(*packs)) == list(range(samples))
    assert max(map(len, packs)) - min(map(len, packs)) <= (samples - 1) // processes
    with pytest.raises(UserError, match=f"each of {samples + 1} processes a batch, and there are {samples} samples"):
        PackSampler(np.full(samples, 2), 100, samples + 1, 0)


def test_an_odd_number_of_batches_is_made_even_for_two_processes():
    lengths = np.array([5, 9, 3, 8, 1])
    assert len(PackSampler(lengths, 10, 1, 0)) == 3
    packs = list(PackSampler(lengths, 10, 2, 0))
    assert len(packs) == 4 and sorted(chain(*packs)) == list(range(5))


def test_epochs_differ_repeat_and_have_equally_many_batches():
    lengths = lengths_of(500)
    epochs = []
    for epoch in (0, 1, 0):
        sampler = PackSampler(lengths, 4096, 4, seed=5)
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[0] == epochs[2] and len(epochs[0]) == len(epochs[1])
    assert set(map(frozenset, epochs[0])) != set(map(frozenset, epochs[1]))  # samples have changed places, too
    assert list(PackSampler(lengths, 4096, 4, seed=6)) != epochs[0]


class Numbers:
    """A set whose samples are their indices."""

    def __len__(self):
        return 300

    def __getitem__(self, index):
        return index


@pytest.fixture
def loader(monkeypatch):
    monkeypatch.setattr("accelerate.data_loader.synchronize_rng_states", lambda *args, **kwargs: None)

    def make(rank, processes, epoch=0):
        sampler = PackSampler(lengths_of(300), 2048, 2, seed=3)
        made = DataLoader(
            Packed(Numbers()), 1, sampler=sampler, collate_fn=lambda packs: collate_packs(packs, collator=list)
        )
        made = prepare_data_loader(made, num_processes=processes, process_index=rank, put_on_device=False)
        made.set_epoch(epoch)
        return made

    return make


def test_processes_have_equally_many_batches_and_every_sample_once(loader):
    shares = [list(loader(rank, 2, epoch=1)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == len(loader(0, 2))
    assert sorted(chain(*shares[0], *shares[1])) == list(range(300))
    assert list(loader(0, 2, epoch=2)) != shares[0]  # the epoch's number has reached the sampler
    alone = list(loader(0, 1, epoch=1))  # one process that continues the run takes the batches of both in turn
    assert alone[::2] == shares[0] and alone[1::2] == shares[1]


def test_a_resumed_epoch_goes_on_where_it_was(loader):
    whole = list(loader(1, 2, epoch=3))
    assert list(skip_first_batches(loader(1, 2, epoch=3), 5)) == whole[5:] != []


GIVEN = ["--data", "x", "--output_dir", "y", "--use_cpu", "true", "--max_length", "512"]
PACKED = ["--padding_free", "true", "--max_tokens_per_batch", "512", "--per_device_train_batch_size", "1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--padding_free false", "give --padding_free true, too"),
        ("--streaming true", "needs the length of every sample; leave out --streaming"),
        ("--group_by_modality_length true", "both choose the samples of a batch: leave one out"),
        ("--train_sampling_strategy sequential", "leave out --train_sampling_strategy"),
        ("--per_device_train_batch_size 4", "is 4: give --per_device_train_batch_size 1"),
        ("--max_tokens_per_batch 511", "is 511, and a sample may have 512 tokens: raise it, or lower --max_length"),
        ("--max_tokens_per_batch 0", "--max_tokens_per_batch is 0; it must be above 0"),
    ],
)
def test_what_does_not_go_with_it_is_refused(words, message):
    _, data, run = parse([*GIVEN, *PACKED])
    check_packing(data, run)
    with pytest.raises(UserError, match=re.escape(message)):
        _, data, run = parse([*GIVEN, *PACKED, *words.split()])
        check_packing(data, run)


def test_more_processes_than_a_run_began_with_are_refused(tmp_path, monkeypatch):
    (tmp_path / "y").mkdir()
    layout = {"processes": 2, "batch": 1, "accumulation": 1}
    (tmp_path / "y/run.json").write_text(json.dumps({"model": {}, "data": {}, "training": {}, "layout": layout}))
    words = [*GIVEN, *PACKED, "--output_dir", str(tmp_path / "y"), "--gradient_accumulation_steps"]
    monkeypatch.chdir(tmp_path)
    assert parse([*words, "2"])[2].layout == Layout(2, 1, 1)  # one process takes the batches of two
    own = Layout(4, 1, 1)
    monkeypatch.setattr("train.arguments.RunArguments.own_layout", property(lambda run: own))
    with pytest.raises(UserError, match="batches as they were .*--max_tokens_per_batch.: continue with 1, 2 processes"):
        parse([*words, "1"])


def test_a_dry_run_says_the_batches_and_what_is_longest(folder, tmp_path, monkeypatch, capsys):
    options = [*packed_run(folder), "--num_train_epochs", "0.1", "--gradient_accumulation_steps", "2"]
    command = ["train", *options, "--use_cpu", "true", "--output_dir", str(tmp_path / "dry"), "--dry_run", "true"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="0"):
        main()
    shown = capsys.readouterr().out
    batches, samples = re.search(r"batches +│ (\d+) batches .* filled, ([\d.]+) samples in each", shown).groups()
    assert int(batches) > 2 and float(samples) == pytest.approx(12 / int(batches), abs=0.05)
    assert re.search(rf"samples a step +│ {2 * 12 / int(batches):.1f} on average", shown)
    steps = math.ceil(0.1 * math.ceil(int(batches) / 2))  # as Trainer rounds; to the nearest would be none
    assert re.search(rf"steps +│ {steps} ", shown)
    assert check(*parse(command[1:-2])).longest == 1200


def windowed():
    config = small_config(None)
    config.text_config = MistralConfig(sliding_window=64)
    return config


@pytest.mark.parametrize(
    ("attention", "config", "expected"),
    [
        (None, small_config(), True),
        ("sdpa", small_config(None), True),
        ("flex_attention", small_config(), False),
        ("flash_attention_2", windowed(), False),
        ("eager", small_config(), "tokens with --attn_implementation eager: use sdpa, flash_attention_2"),
        (None, windowed(), r"attends in a sliding window: .* if --max_length \(2048\) fits the window"),
        (None, small_config(dataclasses.replace(SKIP, text_sees_skipped=False)), "text_sees_skipped is false"),
    ],
)
def test_samples_are_separated_without_a_mask_of_the_row_or_the_run_is_refused(attention, config, expected):
    model, data = SimpleNamespace(attn_implementation=attention), SimpleNamespace(padding_free=True, max_length=2048)
    if isinstance(expected, bool):
        assert attends_per_sample(model, data, config) is expected
        return
    with pytest.raises(UserError, match=expected):
        attends_per_sample(model, data, config)
    assert not attends_per_sample(model, SimpleNamespace(padding_free=False), config)


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path, 6)


def inputs(folder):
    return [
        "--data", str(folder / "data.json"), "--images", str(folder), "--tokenizer", str(folder / "tokenizer"),
        "--template", "v1", "--preset", "sv-llava-100",
    ]  # fmt: skip


def packed_run(folder):
    several = ["--padding_free", "true", "--max_length", "1200", "--per_device_train_batch_size", "1"]
    return [*inputs(folder), *several, "--max_tokens_per_batch", "1200"]


def run(folder, name, *options):
    return train(
        folder / name, "--num_train_epochs", "3", "--logging_steps", "1", "--save_strategy", "no", "--disable_tqdm",
        "true", "--learning_rate", "1e-3", *options,
    )  # fmt: skip


def test_a_packed_run_learns_as_a_padded_one_and_sees_every_sample(folder, capsys, monkeypatch):
    trained = []
    monkeypatch.setattr("train.train.set_attention_per_sample", lambda model: trained.append(attend(model)))
    padded = run(folder, "padded", *inputs(folder), "--per_device_train_batch_size", "12")
    packed = run(folder, "packed", *packed_run(folder), "--gradient_accumulation_steps", "9")
    found = re.search(r"(\d) batches of at most 1,200 tokens an epoch, \d\d\.\d% filled", capsys.readouterr().err)
    assert found and int(found[1]) > 1  # they are all accumulated, so that a step is an epoch
    losses = [[entry["loss"] for entry in result["history"]] for result in (padded, packed)]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=1e-4)
    for name in ("rows", "samples", "supervised", "ffn_rows"):
        assert padded[name] == packed[name], name
    assert trained == [PER_SAMPLE] and PER_SAMPLE not in (folder / "packed/config.json").read_text()


def attend(model):
    set_attention_per_sample(model)
    return model.model.language_model.config._attn_implementation


@pytest.mark.slow
def test_a_killed_run_of_two_processes_is_continued_by_one(tmp_path):
    common = [*write_inputs(tmp_path, dropout=0.0), "--max_steps", "8", "--logging_steps", "1", "--max_length", "400"]
    common += ["--padding_free", "true", "--max_tokens_per_batch", "400", "--per_device_train_batch_size", "1"]
    whole, broken = ([*common, "--output_dir", str(tmp_path / name)] for name in ("whole", "broken"))
    assert launch_and_wait(whole)["code"] == 0
    assert launch_and_wait(broken, strike=(0, "training_step", 5, "SIGKILL"))["code"] == 1
    end = launch_and_wait(broken, processes=1)
    assert end["code"] == 0 and "checkpoint-3 was written by" in end["output"], end["output"]
    whole, broken = outcome(tmp_path / "whole"), outcome(tmp_path / "broken")
    losses = [[entry["loss"] for entry in run["history"]] for run in (whole, broken)]
    assert len(losses[0]) == 8 and losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert broken["sums"] == pytest.approx(whole["sums"], abs=1e-4)
