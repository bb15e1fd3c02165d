"""Ends a run that hangs, and names the process that the other processes wait for."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState

from llava_skip_base.exits import HUNG

LIBRARIES = ("torch/distributed/", "torch/autograd/", "deepspeed/")
"""Parts of the paths of Python files that a process executes while it waits for the others."""
LONGEST_INTERVAL = 5.0
"""Maximum of the seconds between two reports of a process."""


@dataclass
class Report:
    """What a process reports of itself.

    Attributes:
        ticks: reports so far; the number stops when the process does.
        marks: events of the training loop so far; they are the same on every process.
        waiting: its main thread is inside one of `LIBRARIES`.
        place: what it does since the last event, in words.
        host: its machine.
    """

    ticks: int
    marks: int
    waiting: bool
    place: str
    host: str


def find_culprits(earlier: Mapping[int, Report], now: Mapping[int, Report]) -> list[int]:
    """Ranks that the others wait for: those that no longer report, else those that are behind, else those not waiting.

    Args:
        earlier: the reports of the ranks some intervals ago.
        now: their last reports.

    Returns:
        Nothing if all ranks are alike.
    """
    states = {
        rank: (report.ticks > earlier[rank].ticks if rank in earlier else True, report.marks, report.waiting)
        for rank, report in now.items()
    }
    behind = [rank for rank in sorted(now) if states[rank] == min(states.values())]
    return behind if len(behind) < len(now) else []


def is_waiting() -> bool:
    """Whether the main thread is inside a library that waits for other processes."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return any(library in frame.f_code.co_filename for library in LIBRARIES)


class Watchdog(TrainerCallback):
    """A thread on each process that ends it when training makes no progress, or when its launcher is gone.

    Processes report to each other through the store that torchrun keeps.

    Args:
        timeout: seconds without progress after which the run ends with `HUNG`; 0: no limit.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._interval = min(LONGEST_INTERVAL, timeout / 10) if timeout else LONGEST_INTERVAL
        self._launcher = os.getppid()
        self._rank, self._world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._report = Report(0, 0, False, "starting", socket.gethostname())
        self._progress = time.monotonic()
        self._store: Any = None
        self._ended = threading.Event()

    def mark(self, place: str) -> None:
        """Note progress."""
        self._report.marks += 1
        self._report.place = place
        self._progress = time.monotonic()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the thread."""
        if self._world_size > 1:
            self._store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=60),
            )
        self.mark(f"reading the data of step {state.global_step + 1}")
        self._publish()  # so that a process that stops in its first interval is found, too
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The batches of a step were read."""
        self.mark(f"computing step {state.global_step + 1}")

    def on_substep_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One of the batches of a step was computed."""
        self.mark(f"computing step {state.global_step + 1}")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step was computed."""
        step = state.global_step
        self.mark(f"saving step {step}" if control.should_save else f"reading the data of step {step + 1}")

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A batch of the validation data was computed."""
        self.mark(f"validating step {state.global_step}")

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint was written."""
        self.mark(f"reading the data of step {state.global_step + 1}")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the thread."""
        self._ended.set()

    def _watch(self) -> None:
        earlier: dict[int, Report] = {}
        while not self._ended.wait(self._interval):
            if os.getppid() != self._launcher:
                self._say(f"rank {self._rank} ended, because its launcher is gone.")
                os._exit(1)
            self._publish()
            late = time.monotonic() - self._progress - self._timeout
            if not self._timeout or late < 0:
                earlier = {}
            elif not earlier:
                earlier = self._reports()
            elif late > 3 * self._interval:  # all have noticed and reported
                self._end(find_culprits(earlier, self._reports()))

    def _publish(self) -> None:
        self._report.ticks += 1
        self._report.waiting = is_waiting()
        if self._store is not None:
            self._store.set(f"watchdog/{self._rank}", json.dumps(asdict(self._report)))

    def _reports(self) -> dict[int, Report]:
        if self._store is None:
            return {self._rank: replace(self._report)}
        keys = {rank: f"watchdog/{rank}" for rank in range(self._world_size)}
        return {r: Report(**json.loads(self._store.get(key))) for r, key in keys.items() if self._store.check([key])}

    def _end(self, culprits: list[int]) -> None:
        reports = self._reports()
        if self._rank == min(set(reports) - set(culprits)):
            named = "; ".join(f"rank {rank} on {reports[rank].host}, {reports[rank].place}" for rank in culprits[:8])
            who = f"the others wait for {named}" if culprits else f"every rank is {self._report.place}"
            self._say(
                f"no progress for {self._timeout:g} s: {who}. The same command continues from the last checkpoint."
            )
        if self._rank in culprits or not culprits:
            self._say(f"rank {self._rank} on {self._report.host} hangs here:")
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(HUNG)

    @staticmethod
    def _say(text: str) -> None:
        sys.stderr.write(f"\nerror: {text}\n")
        sys.stderr.flush()
