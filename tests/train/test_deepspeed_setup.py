"""Operators that are compiled on first use."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.interrupted import ROOT
from train.resilience.deepspeed_operators import delete_stale_locks

BUILD = """
import os, signal, sys
from torch.utils import cpp_extension
from train.resilience.deepspeed_operators import prepare_deepspeed

prepare_deepspeed()
source, killed = sys.argv[1:]
if killed == "killed":
    cpp_extension._write_ninja_file_and_build_library = lambda **_: os.kill(os.getpid(), signal.SIGKILL)
print(cpp_extension.load("one", [source], is_python_module=False))
"""


def build(source: Path, how: str) -> subprocess.CompletedProcess:
    variables = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TORCH_EXTENSIONS_DIR": source.parent}
    return subprocess.run(
        [sys.executable, "-c", BUILD, str(source), how],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_process_killed_while_it_builds_does_not_stop_the_next(tmp_path):
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    assert build(source, "killed").returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*/one/lock"))) == 1
    built = build(source, "whole")
    assert built.returncode == 0, built.stderr
    assert built.stdout.split()[-1].endswith("one.so")


def test_the_lock_of_a_process_that_still_builds_is_kept(tmp_path):
    (tmp_path / "one").mkdir()
    lock = tmp_path / "one/lock"
    handle = os.open(lock, os.O_CREAT | os.O_EXCL)  # as PyTorch does while it builds
    delete_stale_locks(tmp_path)
    assert lock.exists()
    os.close(handle)
    delete_stale_locks(tmp_path)
    assert not lock.exists()
