"""Operators that are compiled on first use."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.interrupted import ROOT

BUILD = """
import os, signal, sys
from torch.utils import cpp_extension
from train.resilience.deepspeed_operators import prepare_deepspeed

prepare_deepspeed()
source, killed = sys.argv[1:]
if killed == "killed":
    cpp_extension._write_ninja_file_and_build_library = lambda **_: os.kill(os.getpid(), signal.SIGKILL)
print(cpp_extension.load("one", [source], build_directory=os.path.dirname(source), is_python_module=False))
"""


def build(source: Path, how: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "-c", BUILD, str(source), how],
        cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_process_killed_while_it_builds_does_not_stop_the_next(tmp_path):
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    (tmp_path / "lock").touch()  # what a process without our lock leaves
    assert build(source, "killed").returncode == -signal.SIGKILL
    built = build(source, "whole")
    assert built.returncode == 0, built.stderr
    assert built.stdout.split()[-1].endswith("one.so")
