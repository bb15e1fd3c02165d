"""Workers of the loader: how many by default, and the warning where a device waits for batches."""

from types import SimpleNamespace

import pytest
import torch

from llava_skip.vision.values import PixelValues
from tests.support.records import record, stored
from train.arguments import identity, resolved
from train.data import ConversationDataset, ConversationStream, collate, loading, stream_loader
from train.data.loading import DataWait, set_workers
from train.run import parse

GIVEN = ["--data", "x", "--output_dir", "y"]


def chosen(use_cpu: bool, workers: int | None = None, persistent: bool | None = None) -> tuple[int, bool]:
    arguments = SimpleNamespace(
        use_cpu=use_cpu, dataloader_num_workers=workers, dataloader_persistent_workers=persistent
    )
    set_workers(arguments)
    return arguments.dataloader_num_workers, arguments.dataloader_persistent_workers


@pytest.mark.parametrize(("cores", "processes", "expected"), [(2, 1, 2), (4, 1, 3), (64, 8, 4), (8, 8, 2)])
def test_a_device_gets_two_to_four_workers_and_a_cpu_none(monkeypatch, cores, processes, expected):
    monkeypatch.setattr(loading, "usable_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert chosen(use_cpu=False) == (expected, True)
    assert chosen(use_cpu=True) == (0, False)
    assert chosen(use_cpu=False, workers=0) == (0, False)
    assert chosen(use_cpu=False, workers=7, persistent=False) == (7, False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert chosen(use_cpu=False) == (0, False)
    assert chosen(use_cpu=False, workers=1) == (1, False)


def test_a_run_may_continue_with_other_workers_but_not_a_stream():
    def of(*words: str) -> dict:
        return identity(resolved(*parse([*GIVEN, "--use_cpu", "true", *words])))

    with_workers = ("--dataloader_num_workers", "2", "--dataloader_persistent_workers", "true")
    assert of() == of(*with_workers)
    stream = ("--streaming", "true", "--max_steps", "3")
    assert of(*stream) == of(*stream) != of(*stream, *with_workers)


def test_waiting_is_told_once_with_its_cure(monkeypatch, capsys):
    monkeypatch.setattr(loading, "usable_cores", lambda: 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    wait = DataWait(torch.device("cuda"), workers=2)
    for waited in (9.0, 0.4):  # in the first window workers start
        wait.note(waited, 10.0)
    assert not capsys.readouterr().err
    wait.note(0.6, 10.0)
    wait.note(6.0, 10.0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 6% of the last steps' time went into waiting for batches; raise --dataloader_num")
    assert "which is 2: a process has 8 cores" in line
    full = DataWait(torch.device("cpu"), workers=8)
    for waited in (0.0, 5.0):
        full.note(waited, 10.0)
    assert "workers use all 8 cores of a process: make the images smaller" in capsys.readouterr().err
    own = DataWait(torch.device("cpu"), workers=0)
    for waited in (5.0, 5.0, 5.0):
        own.note(waited, 10.0)
    assert not capsys.readouterr().err


def test_a_streams_loader_keeps_its_workers(processor):
    arguments = SimpleNamespace(
        process_index=0, world_size=1, train_batch_size=2, dataloader_num_workers=1, dataloader_pin_memory=False,
        dataloader_persistent_workers=True, dataloader_prefetch_factor=3,
    )  # fmt: skip
    loader = stream_loader(ConversationStream([], processor, 99), arguments, list)
    assert loader.persistent_workers and loader.prefetch_factor == 3


def test_bytes_of_a_loader_have_the_values_of_the_processor(images, processor):
    records = stored([record()], images)
    whole, small = (
        collate([ConversationDataset(records, processor, 999, as_bytes=own)[0]], pad_token_id=0)["pixel_values"]
        for own in (False, True)
    )
    assert small.dtype == torch.uint8 and small.nbytes * 4 == whole.nbytes
    assert torch.equal(PixelValues.of(processor)(small), whole)
