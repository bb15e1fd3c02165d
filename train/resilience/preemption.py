"""Leaving in good order when the cluster wants its nodes back: save at the end of the step, then end the run."""

from __future__ import annotations

import signal
import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl

from train.resilience.exits import STOP_SIGNALS


class Preemption(TrainerCallback):
    """Ends the training behind the step in which any process was sent one of `STOP_SIGNALS`.

    All processes must leave behind the same step. So the wish to leave travels in a reduction of one byte over gloo
    that runs beside the step: started when the step begins, looked at when it ends, it costs no waiting. Before and
    after the training there is nothing to save, and the signals do what they always do.

    Attributes:
        agreed: whether training ended because of a signal; the same on every process.
    """

    def __init__(self) -> None:
        self.agreed = False
        self._asked: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._group: Any = None
        self._wish = torch.zeros(1, dtype=torch.uint8)
        self._reduction: Any = None

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = signal.Signals(number)

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Listen for signals, and make the group that processes agree through."""
        self._handlers = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo")

    def on_step_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Start to ask the others."""
        self._wish.fill_(self._asked is not None)
        if self._group is not None:
            self._reduction = dist.all_reduce(self._wish, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if anyone was asked to."""
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None
        if self._wish.item():
            self.agreed = control.should_save = control.should_training_stop = True
            if state.is_world_process_zero:
                cause = self._asked.name if self._asked else "A signal to another process"
                sys.stderr.write(f"\n{cause}: saving step {state.global_step} and leaving; the same command goes on.\n")

    def on_train_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Listen no more."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
