"""Exit codes of a run, beside 0 (finished) and 1 (a traceback says why), and the signals that ask it to leave."""

import atexit
import os
import signal
import sys
from typing import NoReturn

USER_ERROR = 2
"""A mistake in the arguments or the data."""
TRAINING_ERROR = 3
"""A run that cannot go on: its loss is not finite."""
HUNG = 69
"""No process made progress for `--hang_timeout_seconds`; sysexits.h: EX_UNAVAILABLE."""
NOT_SAVED = 74
"""A checkpoint could not be written; sysexits.h: EX_IOERR."""
PREEMPTED = 75
"""The run was asked to leave, and did: the same command continues it; sysexits.h: EX_TEMPFAIL, "try again later"."""
EXPLAINED = (USER_ERROR, TRAINING_ERROR, HUNG, NOT_SAVED, PREEMPTED)
"""Codes of a process that has said itself why it ended."""

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
