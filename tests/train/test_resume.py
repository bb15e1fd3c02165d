"""One process: whatever ends a run, the same command continues it, with the losses and weights of a whole run."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from filelock import FileLock

from llava_skip_base.exits import HUNG, NOT_SAVED, PREEMPTED, USER_ERROR
from tests.support.interrupted import ROOT, environment, outcome, write_inputs

KILLS = {
    "in the first step": ("training_step", 1),
    "while step 3 is saved, before anything is written": ("save_model", 1),
    "while step 3 is saved, before the optimizer": ("_save_optimizer_and_scheduler", 1),
    "in the middle of a step after a checkpoint": ("training_step", 5),
    "while step 6 is saved, before the manifest": ("seal", 1),
    "when step 9 was saved, before the older one is deleted": ("rotate_checkpoints", 4),  # Trainer calls it, too
    "when the last step is done": ("_finalize_training", 1),
    "while the model is exported": ("_report", 1),
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def undisturbed(attempt, arguments, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    end = attempt([*arguments, "--output_dir", str(output)])
    assert end["code"] == 0, end["output"]
    return outcome(output)


@pytest.fixture
def given(arguments, tmp_path):
    return [*arguments, "--output_dir", str(tmp_path / "run")]


def assert_ends_like(undisturbed, end, output):
    assert end["code"] == 0, end["output"]
    result = outcome(output)
    for key in ("history", "sums", "logged"):
        assert result[key] == undisturbed[key]
    assert result["weights"].keys() == undisturbed["weights"].keys()
    for name, tensor in undisturbed["weights"].items():
        assert torch.equal(tensor, result["weights"][name]), name


def test_a_run_that_was_killed_eight_times_ends_like_one_that_was_not(attempt, given, undisturbed, tmp_path):
    for name, place in KILLS.items():
        end = attempt(given, *place)
        assert end["code"] == -signal.SIGKILL, (name, end["output"])
    end = attempt(given)
    assert_ends_like(undisturbed, end, tmp_path / "run")
    assert "continuing from" in end["output"]
    assert json.loads((tmp_path / "run/train_result.json").read_text())["continued_from_step"] == 13


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            ("--streaming", "true", "--dataloader_num_workers", "2", "--shuffle_buffer", "5"), marks=pytest.mark.slow
        ),
        ("--group_by_modality_length", "true"),
        pytest.param(
            "--padding_free true --max_tokens_per_batch 400 --max_length 400 --per_device_train_batch_size 1".split(),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda options: options[0],
)
def test_every_way_to_read_data_is_continued(attempt, arguments, tmp_path, options):
    whole, broken = ([*arguments, *options, "--output_dir", str(tmp_path / name)] for name in ("whole", "broken"))
    assert attempt(whole)["code"] == 0
    assert attempt(broken, "training_step", 8)["code"] == -signal.SIGKILL
    end = attempt(broken)
    assert f"continuing from {tmp_path / 'broken/checkpoint-6'}" in end["output"]
    assert_ends_like(outcome(tmp_path / "whole"), end, tmp_path / "broken")


@pytest.mark.parametrize(
    ("place", "last"), [("_save_optimizer_and_scheduler", "model.safetensors"), ("seal", "trainer_state.json")]
)
def test_a_checkpoint_that_was_being_written_is_passed_over_with_a_message(attempt, given, tmp_path, place, last):
    attempt(given, place, 2)
    assert (tmp_path / "run/checkpoint-6" / last).is_file()
    assert not (tmp_path / "run/checkpoint-6/checkpoint.json").exists()
    assert (tmp_path / "run/checkpoint-3").is_dir()
    end = attempt(given, "training_step", 1)
    assert "checkpoint-6 was being written when the run ended: passed over and deleted." in end["output"]
    assert f"continuing from {tmp_path / 'run/checkpoint-3'}" in end["output"]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3"]
    assert not (tmp_path / "run/.unfinished").exists()


def test_a_preempted_run_saves_the_step_and_ends_like_an_undisturbed_one(attempt, given, undisturbed, tmp_path):
    for name, step in (("SIGUSR1", 2), ("SIGTERM", 5)):
        end = attempt(given, "training_step", step, name)
        assert end["code"] == PREEMPTED, end["output"]
        assert f"{name}: saving step" in end["output"] and not (tmp_path / "run/train_result.json").exists()
    assert_ends_like(undisturbed, attempt(given), tmp_path / "run")


def damage(checkpoint):
    """Shorten a file, as a full or broken disk does."""
    (checkpoint / "optimizer.pt").write_bytes(b"short")


def test_damaged_checkpoints_are_passed_over_and_renamed(attempt, given, undisturbed, tmp_path):
    output = tmp_path / "run"
    attempt([*given, "--save_total_limit", "3"], "training_step", 11)
    damage(output / "checkpoint-9")
    (output / "checkpoint-6/checkpoint.json").unlink()
    end = attempt(given)
    assert "checkpoint-9 is damaged (optimizer.pt with its 5 bytes is not what was written" in end["output"]
    assert "checkpoint-6 is damaged (it has no checkpoint.json): passed over" in end["output"]
    assert f"continuing from {output / 'checkpoint-3'}" in end["output"]
    assert (output / "damaged-checkpoint-9").is_dir()
    assert_ends_like(undisturbed, end, output)


@pytest.mark.slow
def test_a_run_without_a_whole_checkpoint_does_not_start_again_by_itself(attempt, given, tmp_path):
    attempt(given, "training_step", 5)
    damage(tmp_path / "run/checkpoint-3")
    end = attempt(given)
    assert end["code"] == USER_ERROR and "Loading weights" not in end["output"]
    assert "No checkpoint of OUTPUT" in end["output"] and "checkpoint-3: optimizer.pt with its 5 bytes" in end["output"]


def test_another_number_of_processes_is_refused_before_weights_are_loaded(attempt, given, tmp_path):
    attempt(given, "training_step", 5)
    manifest = tmp_path / "run/checkpoint-3/checkpoint.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"world_size": 8, "zero_stage": 2}))
    end = attempt(given)
    assert end["code"] == USER_ERROR and "Loading weights" not in end["output"]
    assert "was written by 8 processes under ZeRO-2, and this run has 1 process without DeepSpeed" in end["output"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no file system can be mounted here: {mount.stderr}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(attempt, arguments, small_disk, undisturbed):
    given = [*arguments, "--output_dir", str(small_disk / "run")]
    attempt(given, "training_step", 5)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    end = attempt(given)
    assert end["code"] == NOT_SAVED, end["output"]
    assert "error: rank 0 could not write checkpoint-6 (" in end["output"] and "No space left" in end["output"]
    assert "checkpoint-3 is whole and was kept" in end["output"] and "make room" in end["output"]
    filler.unlink()
    assert_ends_like(undisturbed, attempt(given), small_disk / "run")


def test_two_runs_never_write_into_one_folder(attempt, given, tmp_path):
    attempt(given, "training_step", 1)
    with FileLock(tmp_path / "run/.lock"):
        end = attempt(given)
    assert end["code"] == USER_ERROR and "is in use by another run" in end["output"]


def test_ctrl_c_ends_a_process_without_a_traceback(given, tmp_path):
    command = [sys.executable, "-m", "train.train", *given, "--max_steps", "100000", "--save_total_limit", "2"]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (tmp_path / "run/train_log.jsonl").is_file():
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT and "Traceback" not in said, said


@pytest.mark.slow
def test_a_run_that_hangs_is_ended_and_shows_where(attempt, given):
    end = attempt([*given, "--hang_timeout_seconds", "2"], "encode_conversation", 9, "HANG")
    assert end["code"] == HUNG, end["output"]
    assert "error: no progress for 2 s: every rank is reading the data of step" in end["output"]
    assert "hangs here:" in end["output"] and "in encode_conversation" in end["output"]
