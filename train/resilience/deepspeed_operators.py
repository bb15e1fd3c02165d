"""What DeepSpeed is told before it starts: which C++ operators to build, and under which lock."""

from __future__ import annotations

from filelock import FileLock
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

UNUSED = "deepspeed_shm_comm"
"""DeepSpeed compiles it for the CPU in every process; only its inference calls it."""


class BuildLock(FileBaton):
    """What PyTorch takes for the build of an operator, given back by the kernel when its process dies.

    PyTorch's own is a file which a killed process leaves behind, and which every later process on the machine then
    waits for without end or word.

    Args:
        lock_file_path: the file that PyTorch would use.
    """

    def __init__(self, lock_file_path: str) -> None:
        super().__init__(lock_file_path)
        self._lock = FileLock(f"{lock_file_path}.held")

    def try_acquire(self) -> bool:
        """Wait for the lock and take it: a process whose turn comes late finds the operator built, or builds it."""
        self._lock.acquire()
        return True

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()


def prepare_deepspeed() -> None:
    """Call this before DeepSpeed starts."""
    from deepspeed import ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":  # elsewhere DeepSpeed does not ask, and the table costs time to make
        ops.__compatible_ops__[UNUSED] = False
    cpp_extension.FileBaton = BuildLock  # type: ignore[assignment, misc]
