"""Preemption: when the cluster needs its nodes, save at the end of the step, then end the run."""

from __future__ import annotations

import signal
import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl

from train.resilience.exits import STOP_SIGNALS


class Preemption(TrainerCallback):
    """Ends training after the step in which any process got one of `STOP_SIGNALS`.

    All processes must stop after the same step. They agree by a reduction of one byte over gloo, which starts when a
    step begins and is read when it ends, so that no process waits for it. Before and after training there is nothing to
    save, and the signals have their usual effect.

    Attributes:
        agreed: whether training ended because of a signal; the same on every process.
    """

    def __init__(self) -> None:
        self.agreed = False
        self._asked: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._group: Any = None
        self._any_asked = torch.zeros(1, dtype=torch.uint8)
        self._reduction: Any = None

    @property
    def is_asked(self) -> bool:
        """Whether this process got a signal."""
        return self._asked is not None

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = signal.Signals(number)

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Handle the signals, and make the process group of the reduction."""
        self._handlers = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo")

    def on_step_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Start the reduction."""
        self._any_asked.fill_(self._asked is not None)
        if self._group is not None:
            self._reduction = dist.all_reduce(self._any_asked, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if any process was asked to."""
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None
        if self._any_asked.item():
            self.agreed = control.should_save = control.should_training_stop = True
            if state.is_world_process_zero:
                cause = self._asked.name if self._asked else "A signal to another process"
                sys.stderr.write(
                    f"\n{cause}: saving step {state.global_step} and leaving; the same command continues.\n"
                )

    def on_train_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Restore the handlers of the signals."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
