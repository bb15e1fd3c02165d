"""Operators that DeepSpeed compiles when it needs them: where, and what a killed process leaves there."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch.utils.cpp_extension import get_default_build_root

FOLDER = "TORCH_EXTENSIONS_DIR"
"""Variable with the folder in which PyTorch builds operators."""
UNUSED = "deepspeed_shm_comm"
"""DeepSpeed compiles it for the CPU in every process; only its inference calls it."""


def prepare_deepspeed() -> None:
    """Choose the build folder of this machine and delete the locks of dead processes; call it before DeepSpeed starts.

    PyTorch's lock on a build is a file. A killed process leaves it, and later builds would wait for it without end.
    """
    from deepspeed import ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":  # elsewhere DeepSpeed does not ask, and the table costs time to make
        ops.__compatible_ops__[UNUSED] = False
    own = f"{platform.node()}-python{platform.python_version()}-torch{torch.__version__}"
    root = Path(os.environ.get(FOLDER) or get_default_build_root())
    root = root if root.name == own else root / own
    os.environ[FOLDER] = str(root)
    delete_stale_locks(root)


def delete_stale_locks(root: Path) -> None:
    """Delete the build locks in a folder of this machine that no process has open."""
    locks = _unused(root.glob("*/lock"))
    if locks:
        time.sleep(1)  # a process that ends its build closes the lock before it deletes it
    for lock in _unused(lock for lock in locks if lock.exists()):
        lock.unlink(missing_ok=True)


def _unused(locks: Iterable[Path]) -> list[Path]:
    """The locks that no process has open."""
    if not (found := [lock.resolve() for lock in locks]):
        return []
    used = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or belongs to someone else
            used |= {Path(file.path) for file in process.open_files()}
    return [lock for lock in found if lock not in used]
