"""The signals that ask a run to stop, and the end of a process."""

import atexit
import os
import signal
import sys
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What `kill`, containers and SLURM's preemption send, and what `scripts/slurm` sends before the time limit."""
_code: int | None = None


def leave(code: int) -> NoReturn:
    """End this process after its exit handlers, but before the interpreter is torn down.

    Threads of torch.distributed and DeepSpeed may still run during the teardown, and abort a process that has done all
    its work: one of two under ZeRO-3 ended with SIGABRT, once in about thirty runs.
    """
    global _code
    _code = code
    raise SystemExit(code)


def _end() -> None:
    if _code is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_code)


atexit.register(_end)  # handlers run in reverse order: those of wandb and others are registered later and run before
