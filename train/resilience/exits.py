"""The signals that ask a run to stop, and the end of a process."""

import atexit
import os
import signal
import sys
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What `kill`, containers and SLURM's preemption send, and what `scripts/slurm` sends before the time limit."""


def leave(code: int) -> NoReturn:
    """End this process with everything written, but without the interpreter's teardown.

    Threads of torch.distributed and DeepSpeed may still run then, and abort a process that has done all its work: one
    of two under ZeRO-3 ended with SIGABRT, once in about thirty runs.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
