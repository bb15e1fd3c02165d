"""torchrun that tells its processes when the cluster wants its nodes back, and without its traceback.

`python -m train.launch [torchrun options] -m train.train [arguments]`
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from llava_skip.exits import EXPLAINED, PREEMPTED
from train.resilience.exits import STOP_SIGNALS

TAIL = 25
"""Lines of a failed process's log that are shown."""
TOGETHER = 2
"""Seconds between the end of a process and that of another one that failed over it; torchrun kills after 30."""


class Forwarding:
    """Passes `STOP_SIGNALS` on to the processes and waits for them; torchrun would kill them after 30 seconds."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._forward)

    def _forward(self, number: int, frame: Any) -> None:
        self.asked = signal.Signals(number)
        processes = psutil.Process().children()
        for process in processes:
            process.send_signal(number)
        if not processes:  # nothing runs yet: the launcher is still looking for the other nodes
            raise SystemExit(PREEMPTED)


def show_log(failure: ProcessFailure) -> None:
    """The end of what a process wrote, if that went into a file (torchrun's --redirects)."""
    log = Path(failure.error_file).with_name("stderr.log")
    if log.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        sys.stderr.write("".join(f"{line}\n" for line in [f"the end of {log}:", *lines]))


def find_cause(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first; of those in the same moment one that was killed, as the others then fail over it."""
    first = min(failure.timestamp for failure in failures.values())
    together = {rank: failure for rank, failure in failures.items() if failure.timestamp <= first + TOGETHER}
    killed = {rank: f for rank, f in together.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM}
    return min((killed or together).items(), key=lambda item: item[1].timestamp)


def explain(rank: int, failure: ProcessFailure) -> str:
    """What ended a process, in words."""
    if failure.exitcode >= 0:
        return f"error: rank {rank} ended with code {failure.exitcode}; its output is above."
    name = signal.Signals(-failure.exitcode).name
    hint = " (by the kernel for lack of memory, if by nobody else)" if name == "SIGKILL" else ""
    return f"error: rank {rank} was killed by {name}{hint}; the same command continues from the last checkpoint."


def main() -> None:
    """Start the processes; leave with the exit code of the first one that failed, or with `PREEMPTED`."""
    os.environ["LAUNCHED_AT"] = str(time.time())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    forwarding = Forwarding()
    try:
        run.main(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
    except SignalException as stop:
        sys.stderr.write(
            f"error: stopped by {stop.sigval.name}; the same command continues from the last checkpoint.\n"
        )
        raise SystemExit(128 + stop.sigval) from None
    except ChildFailedError as error:
        rank, failure = find_cause(error.failures)
        if forwarding.asked and failure.exitcode == -forwarding.asked:  # it had nothing to save yet
            raise SystemExit(PREEMPTED) from None
        show_log(failure)
        if failure.exitcode not in EXPLAINED:
            sys.stderr.write(f"{explain(rank, failure)}\n")
        raise SystemExit(failure.exitcode if failure.exitcode > 0 else 1) from None


if __name__ == "__main__":
    main()
