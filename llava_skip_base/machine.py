"""What the machine has, and what this process takes of it."""

import os
import resource
import sys
from pathlib import Path

_SYSTEM, _CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_PEAK_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def usable_cores() -> int:
    """Cores that this process may use; all of the machine where the system does not say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int | None:
    """Bytes that processes may still take, within the limit of a container; None where the system does not say."""
    try:
        lines = _SYSTEM.read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:  # cgroup v2; "max" is no limit
        limit, used = (int((_CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (_CONTAINER / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return free
    # Files that were read count as used, and make room when it is needed.
    files = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return max(0, min(free, limit - used + files))


def restart_peak_memory() -> bool:
    """Let `peak_memory` count from now on; False where the system cannot, and it counts from the process's start."""
    try:
        _PEAK_RESET.write_text("5")  # proc(5): sets the peak to what is resident now
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """The most bytes of this process that were resident (in memory, not swapped out) at one time."""
    try:
        lines = _STATUS.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) of both
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
