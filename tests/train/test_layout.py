"""Another number of processes takes the same samples a step, or the run is refused with the numbers that fit."""

import json
from itertools import chain

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from llava_skip.configuration import IGNORE_INDEX
from llava_skip_base.errors import UserError
from tests.support.interrupted import write_inputs
from train.data.dataset import FLAGS
from train.data.relaid import Relaid, Rounds, order_of
from train.resilience.checkpoint import Manifest, seal
from train.resilience.layout import Layout, begun_with, continued
from train.resilience.restart import prepare
from train.run import check_output, parse


@pytest.mark.parametrize(
    ("begun", "processes", "expected"),
    [
        ((2, 2, 1), 1, (1, 2, 2)),
        ((1, 4, 1), 2, (2, 2, 1)),
        ((1, 1, 8), 2, (2, 1, 4)),
        ((8, 16, 1), 4, (4, 16, 2)),
        ((4, 16, 2), 8, (8, 8, 2)),  # half a batch: an epoch may end with 64 samples
        ((4, 16, 2), 64, (64, 1, 2)),
        ((4, 16, 2), 128, (128, 1, 1)),
        ((3, 4, 1), 4, (4, 3, 1)),
        ((2, 2, 1), 3, None),
        ((2, 2, 1), 8, None),
    ],
)
def test_the_samples_of_a_step_stay_the_same(begun, processes, expected):
    layout = Layout(*begun).on(processes)
    assert layout == (expected and Layout(*expected))
    assert layout is None or layout.samples == Layout(*begun).samples


def test_a_mean_of_batch_means_keeps_its_batches():
    begun = Layout(4, 8, 2)
    assert begun.on(2, same_batches=True) == Layout(2, 8, 4)
    assert begun.fitting(same_batches=True) == [1, 2, 4] and begun.fitting() == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ((1, 2, 1), (1, 2, 2)),  # the same command
        ((1, 1, 4), (1, 1, 4)),  # arguments that make the same
        ((4, 2, 1), (4, 1, 1)),
        ((2, 2, 1), (2, 2, 1)),
        ((2, 1, 2), (2, 1, 2)),
    ],
)
def test_arguments_of_a_restart(own, expected, tmp_path):
    assert continued(Layout(2, 2, 1), Layout(*own), False, tmp_path) == Layout(*expected)


@pytest.mark.parametrize(
    ("own", "same_batches", "message"),
    [
        ((3, 2, 1), False, r"4 samples a step \(2 processes x 2 .* with 1, 2, 4 processes"),
        ((1, 4, 2), False, "with 1, 2, 4 processes"),
        ((2, 4, 1), False, r"holds another run \(4 samples a step: .*; now 8: 2 processes x 4 samples"),
        ((4, 2, 1), True, "in batches as they were .*with 1, 2 processes"),
        ((4, 1, 1), True, "in batches as they were .*with 1, 2 processes"),
    ],
)
def test_a_restart_that_does_not_fit_is_refused_with_the_numbers_that_do(own, same_batches, message, tmp_path):
    with pytest.raises(UserError, match=message):
        continued(Layout(2, 2, 1), Layout(*own), same_batches, tmp_path)


def shares(count, layout, drop_last):
    """The samples of each step of an epoch, as accelerate divides them among the processes of a layout."""
    batches = BatchSampler(SequentialSampler(range(count)), layout.batch, drop_last)
    ranks = [list(BatchSamplerShard(batches, layout.processes, rank)) for rank in range(layout.processes)]
    sizes = range(0, len(ranks[0]), layout.accumulation)
    return [sorted(chain(*(i for r in ranks for i in r[s : s + layout.accumulation]))) for s in sizes]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("begun", [(2, 2, 1), (3, 2, 2), (1, 1, 6), (2, 3, 2)])
@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_other_processes_see_the_same_samples_in_each_step(begun, processes, drop_last):
    begun = Layout(*begun)
    if (own := begun.on(processes)) is None:
        return
    for count in (1, 5, 24, 25, 29):
        rounds = Rounds(SequentialSampler(range(count)), begun.round, own.round, drop_last)
        order = list(rounds)
        assert len(order) == len(rounds)
        steps = shares(len(order), own, drop_last)
        seen = [sorted(order[i] for i in step if order[i] < count) for step in steps]
        assert seen == shares(count, begun, drop_last)
        assert len(order) - sum(map(len, seen)) < own.round  # no more silent samples than the processes need
        if begun.round % own.round == 0:
            assert max(order, default=0) < count


def test_the_order_of_an_epoch_is_that_of_the_loader():
    loader = DataLoader(range(5), batch_size=2, shuffle=True)
    assert order_of(loader) is loader.sampler
    loader = DataLoader(range(5), batch_sampler=BatchSamplerShard(loader.batch_sampler, 2, 0))
    assert isinstance(order_of(loader), torch.utils.data.RandomSampler)


def test_a_silent_sample_teaches_nothing():
    sample = {"input_ids": [1, 2], "labels": [3, 4], "truncated": 5, "unsupervised": True, "unread": True}
    relaid = Relaid([sample])
    assert relaid[0] is sample
    assert relaid[1] == {"input_ids": [1, 2], "labels": [IGNORE_INDEX] * 2, **dict.fromkeys(FLAGS, 0)}


@pytest.fixture
def words(tmp_path):
    return [*write_inputs(tmp_path), "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "run")]


def record(tmp_path, **changed):
    """A run folder that says how a step was divided."""
    (tmp_path / "run").mkdir(exist_ok=True)
    content = {"model": {}, "data": {}, "training": {}} | changed
    (tmp_path / "run/run.json").write_text(json.dumps(content))


def test_the_command_line_of_a_restart_takes_the_samples_of_the_run(words, tmp_path):
    record(tmp_path, layout={"processes": 2, "batch": 2, "accumulation": 3})
    run = parse(words[: words.index("--per_device_train_batch_size")] + ["--output_dir", str(tmp_path / "run"),
                "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3"])[2]  # fmt: skip
    assert (run.per_device_train_batch_size, run.gradient_accumulation_steps) == (2, 6)
    assert run.layout == Layout(2, 2, 3) and run.own_layout == Layout(1, 2, 6)
    with pytest.raises(UserError, match="holds another run|do not make the same"):
        parse(words)  # 2 samples where the run had 12
    assert parse([*words, "--overwrite", "true"])[2].layout == Layout(1, 2, 1)


def test_folders_of_earlier_versions(tmp_path):
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    record(tmp_path, training=sizes)
    assert begun_with(tmp_path / "run", 4) == Layout(4, 2, 3)  # no checkpoint: it starts from step 0 anyway
    (tmp_path / "run/checkpoint-3").mkdir()
    seal(tmp_path / "run/checkpoint-3", Manifest(3, 2, 2))
    assert begun_with(tmp_path / "run", 4) == Layout(2, 2, 3)
    assert begun_with(tmp_path / "nothing", 4) is None


DAMAGED = ["", "[]", "{}", '{"model": 1, "data": {}, "training": {}}', '{"model": {}, "da']
LAYOUTS = [[2], {"processes": 2}, {"processes": 0, "batch": 1, "accumulation": 1}]


@pytest.mark.parametrize(
    "text", [*DAMAGED, *(json.dumps({"model": {}, "data": {}, "training": {}, "layout": one}) for one in LAYOUTS)]
)
def test_a_damaged_record_is_one_message(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run.json"):
        begun_with(tmp_path, 1)
    if "layout" not in text:
        with pytest.raises(UserError, match=r"run.json"):
            check_output(tmp_path, {"model": {}, "data": {}, "training": {}}, overwrite=False)


@pytest.mark.parametrize(("stage", "hint"), [(3, "under a ZeRO stage, such as 3"), (None, None)])
def test_between_zero_and_no_zero_a_checkpoint_is_refused(words, tmp_path, stage, hint, capsys):
    checkpoint = tmp_path / "run/checkpoint-3"
    checkpoint.mkdir(parents=True)
    seal(checkpoint, Manifest(3, 2, stage))
    run = parse(words)[2]
    if hint:
        with pytest.raises(
            UserError, match=f"by 2 processes under ZeRO-3, and this run has 1 process without .*{hint}"
        ):
            prepare(checkpoint, run)
        seal(checkpoint, Manifest(3, 2, 0))
        with pytest.raises(UserError, match="this run has 1 process without .*such as 0"):
            prepare(checkpoint, run)
    else:
        prepare(checkpoint, run)
        assert "2 processes without DeepSpeed, and this run has 1 process without" in capsys.readouterr().err
