"""Two processes under DeepSpeed: whatever happens to one of them, the run ends with its name, and can be continued."""

import os
import re
import shlex
import signal
import sys
import time

import psutil
import pytest
import torch

from llava_skip_base.exits import HUNG, PREEMPTED, USER_ERROR
from tests.support.interrupted import ROOT, launch, launch_and_wait, outcome, write_inputs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 3])
def arguments(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    batch = ["--per_device_train_batch_size", "2"]
    return [*write_inputs(folder, mixed=False), *batch, "--deepspeed", str(ROOT / f"scripts/zero{request.param}.json")]


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    end = launch_and_wait([*arguments, "--output_dir", str(output)])
    assert end["code"] == 0, end["output"]
    return outcome(output)


def test_killed_and_preempted_processes_change_nothing(arguments, undisturbed, tmp_path):
    output = tmp_path / "run"
    given = [*arguments, "--output_dir", str(output)]
    for strike in ((1, "training_step", 5, "SIGKILL"), (1, "_save_rng_state", 1, "SIGKILL"), (0, "seal", 1, "SIGKILL")):
        end = launch_and_wait(given, strike=strike)
        assert end["code"] == 1, end["output"]
        assert f"error: rank {strike[0]} was killed by SIGKILL" in end["output"]
        assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-3"]
    end = launch_and_wait(given, strike=(1, "training_step", 2, "SIGUSR1"))  # only rank 1 is told
    assert end["code"] == PREEMPTED and "A signal to another process: saving step" in end["output"], end["output"]
    end = launch_and_wait(given)
    assert end["code"] == 0, end["output"]
    result = outcome(output)
    assert result["sums"] == pytest.approx(undisturbed["sums"], abs=1e-5)
    assert [loss for _, _, loss in result["logged"][:-1]] == pytest.approx(
        [loss for _, _, loss in undisturbed["logged"][:-1]], abs=1e-5
    )
    for name, tensor in undisturbed["weights"].items():
        torch.testing.assert_close(result["weights"][name], tensor, atol=1e-5, rtol=0)


@pytest.fixture
def given(tmp_path):
    return [
        *write_inputs(tmp_path),
        "--deepspeed",
        str(ROOT / "scripts/zero2.json"),
        "--output_dir",
        str(tmp_path / "run"),
    ]


def processes_of(launcher):
    return [child for child in psutil.Process(launcher.pid).children() if "tests.support.strikes" in child.cmdline()]


def wait_for(path, launcher):
    while not path.exists():
        assert launcher.poll() is None, launcher.stdout.read()
        time.sleep(0.05)


def test_a_signal_to_the_launcher_is_passed_on(given, tmp_path):
    launcher = launch([*given, "--max_steps", "500"])
    wait_for(tmp_path / "run/checkpoint-3", launcher)
    launcher.send_signal(signal.SIGTERM)
    output = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == PREEMPTED, output
    step = re.search(r"SIGTERM: saving step (\d+)", output).group(1)
    assert (tmp_path / f"run/checkpoint-{step}/checkpoint.json").is_file()


def test_a_process_that_hangs_is_named(given):
    end = launch_and_wait([*given, "--hang_timeout_seconds", "4"], strike=(1, "encode_conversation", 9, "HANG"))
    assert end["code"] == HUNG, end["output"]
    assert "no progress for 4 s: the others wait for rank 1 on" in end["output"]
    assert "reading the data of step" in end["output"] and "in encode_conversation" in end["output"]


def test_a_process_that_is_stopped_is_named_by_the_others(given):
    end = launch_and_wait(
        [*given, "--hang_timeout_seconds", "6"], "--shutdown-timeout", "3", strike=(1, "training_step", 3, "SIGSTOP")
    )
    assert end["code"] == HUNG, end["output"]
    assert "the others wait for rank 1 on" in end["output"]


def test_processes_do_not_outlive_their_launcher(given, tmp_path):
    launcher = launch([*given, "--max_steps", "5000"])
    wait_for(tmp_path / "run/checkpoint-3", launcher)
    processes = processes_of(launcher)
    assert len(processes) == 2
    os.kill(launcher.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


def test_machines_that_see_other_records_are_refused(tmp_path):
    for rank, shown in enumerate(("all", "some")):
        folder = tmp_path / str(rank)
        folder.mkdir()
        arguments = write_inputs(folder)
        if shown == "some":
            (folder / "1.png").unlink()
    relative = [word.replace(f"{folder}/", "").replace(str(folder), ".") for word in arguments]
    program = f"cd {tmp_path}/$RANK && exec {sys.executable} -m train.train {shlex.join(relative)}"
    end = launch_and_wait(
        [], "--no-python", program=("bash", "-c", f"{program} --drop_faulty true --output_dir {tmp_path}/run")
    )
    assert end["code"] == USER_ERROR, end["output"]
    told = r"error: rank 1 on \S+ reads 21 records and drops 1, rank 0 on \S+ reads 22 records and drops 0: DATA and"
    assert re.search(told, end["output"]), end["output"]
    assert not (tmp_path / "run").exists()
