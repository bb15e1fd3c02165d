"""The launcher: its command line, the environment of the processes, and which one is named when they fail."""

import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from llava_skip_base.errors import UserError
from llava_skip_base.exits import NOT_SAVED
from llava_skip_base.paths import checkout
from train.launch import find_cause, main, processes_here, set_environment, torchrun_words
from train.reporting.callbacks import LogLine

CPU = ["--use_cpu", "true", "--dataloader_pin_memory", "false"]


@pytest.fixture
def bare(monkeypatch):
    """An environment without the launcher's variables, on a machine without GPUs; changes of it are undone."""
    environment = {name: value for name, value in os.environ.items() if name not in ("NPROC", "TORCHRUN", "DRY_RUN")}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return environment


def test_the_number_of_processes_is_given_or_that_of_the_gpus(bare, monkeypatch):
    assert processes_here() == 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert processes_here() == 8
    bare["NPROC"] = "3"
    assert processes_here() == 3
    for wrong in ("0", "-1", "two", "1.5"):
        bare["NPROC"] = wrong
        with pytest.raises(UserError, match=f"NPROC is '{wrong}'; it must be a number of processes, 1 or more."):
            processes_here()


def test_the_arguments_of_a_run_become_a_command_line_of_torchrun(bare, monkeypatch):
    words = torchrun_words(["--data", "x"])
    assert words[:4] == ["--standalone", "--nproc_per_node", "2", "-m"] and words[-6:] == ["--data", "x", *CPU]
    bare["TORCHRUN"] = "--nnodes 2 --log-dir 'a b'"
    assert torchrun_words([])[:4] == ["--nnodes", "2", "--log-dir", "a b"]
    assert torchrun_words(["--use-cpu=false"]).count("--use_cpu") == 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert torchrun_words(["--tf32", "false"])[-4:] == ["--tf32", "false", "--bf16", "true"]
    with pytest.raises(UserError, match="There is no recipe 'nowhere'"):
        torchrun_words(["--recipe", "nowhere"])


def test_the_processes_know_the_project_and_share_the_cores(bare, monkeypatch):
    monkeypatch.setattr("train.launch.usable_cores", lambda: 7)
    bare.pop("OMP_NUM_THREADS", None)
    bare["PYTHONPATH"] = "mine"
    set_environment(3)
    assert bare["PYTHONPATH"] == f"{checkout()}{os.pathsep}mine" and bare["PYTHONSAFEPATH"] == "1"
    assert (bare["OMP_NUM_THREADS"], bare["DS_ACCELERATOR"]) == ("2", "cpu")
    bare["OMP_NUM_THREADS"] = "5"
    set_environment(8)
    assert bare["OMP_NUM_THREADS"] == "5"


def test_a_dry_run_of_the_launcher_prints_words_for_the_shell(bare, monkeypatch, capsys):
    bare["DRY_RUN"] = "1"
    monkeypatch.setattr("sys.argv", ["launch", "--images", "it's here"])
    main()
    assert shlex.split(capsys.readouterr().out)[-6:] == ["--images", "it's here", *CPU]


def test_help_is_printed_once_in_groups(bare, monkeypatch, capsys):
    shown = {}
    for option in ("--help", "--help-all"):
        monkeypatch.setattr("sys.argv", ["llava-skip train", option])
        with pytest.raises(SystemExit, match="0"):
            main()
        shown[option] = capsys.readouterr().out
    groups = re.findall(r"^(\w+):$", shown["--help"], re.MULTILINE)
    assert sorted(groups) == ["data", "model", "optimisation", "reporting", "resilience", "validation"]
    assert "--vision_tower" in shown["--help"] and "--adam_epsilon " not in shown["--help"]
    assert (
        "--torch_compile " not in shown["--help-all"]
        and "--adam_epsilon " in shown["--help-all"]
        and shown["--help"].count("--recipe NAME") == 1
    )


@pytest.mark.parametrize(
    ("ends", "cause"),
    [
        ({0: (NOT_SAVED, 100), 1: (-9, 100)}, 1),  # rank 0 could not save, because rank 1 was gone
        ({0: (NOT_SAVED, 100), 1: (-9, 130)}, 0),  # rank 1 was killed by the launcher, 30 seconds later
        ({0: (-15, 100), 1: (1, 100)}, 0),
        ({0: (1, 101), 1: (1, 100)}, 1),
    ],
)
def test_the_rank_that_the_others_failed_over_is_named(ends, cause):
    failures = {rank: SimpleNamespace(exitcode=code, timestamp=time) for rank, (code, time) in ends.items()}
    assert find_cause(failures)[0] == cause


TEARDOWN_THAT_ABORTS = """
import atexit, os
from train.resilience.exits import leave

class Aborts:
    def __del__(self):
        os.abort()

kept = Aborts()
atexit.register(print, "reported", end="")
print("written, ", end="")
leave(75)
"""


def test_a_process_leaves_with_everything_written_and_no_teardown():
    end = subprocess.run([sys.executable, "-c", TEARDOWN_THAT_ABORTS], capture_output=True, text=True)
    assert (end.returncode, end.stdout) == (75, "written, reported"), end.stderr


FAULTY_REPORTING = """
import train.reporting.callbacks

def check_reporters(arguments):
    one, two = ()

train.reporting.callbacks.check_reporters = check_reporters
from train.train import main

main()
"""


def test_a_programming_error_keeps_its_traceback_and_another_code():
    words = ["--data", "x", "--output_dir", "nowhere", "--use_cpu", "true"]
    end = subprocess.run([sys.executable, "-c", FAULTY_REPORTING, *words], capture_output=True, text=True)
    assert end.returncode == 1 and "Traceback" in end.stderr and "error: not enough values" not in end.stderr
    assert end.stderr.rstrip().endswith("ValueError: not enough values to unpack (expected 2, got 0)")


def test_a_log_file_has_one_line_a_step_and_no_bar(capsys):
    line, state = LogLine(), TrainerState(is_world_process_zero=True, max_steps=120)
    line.on_train_begin(None, state, TrainerControl())
    state.global_step = 7
    metrics = {"loss": 1.5, "learning_rate": 2e-5, "tokens_per_second": 12345.6, "skipped_ffn_share": 0.2, "epoch": 1}
    line.on_log(None, state, TrainerControl(), logs=metrics)
    line.on_log(None, state, TrainerControl(), logs={"train_runtime": 3})  # not a step
    shown = capsys.readouterr().out
    start = "step   7/120 | loss  1.5000 | rate 2.00e-05 |    12,346 tokens/s | skipped 20.0% | 0:00:00 elapsed, "
    assert shown.startswith(start) and shown.endswith(" left\n") and shown.count("\n") == 1 and "\r" not in shown
