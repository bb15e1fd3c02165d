"""The folder of a run: one run at a time writes there, and continues from what an earlier attempt left."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout

from llava_skip_base.errors import UserError
from llava_skip_base.files import write_json
from train.resilience.checkpoint import find_checkpoint
from train.resilience.layout import RECORD
from train.resilience.loading import check_states
from train.resilience.restart import prepare

if TYPE_CHECKING:
    from train.arguments import RunArguments

DROPPED, RESULT, LOCK = "dropped.json", "train_result.json", ".lock"
"""Files in it: the records that were dropped, the result (written last), and the lock of the run that writes there."""
LOCK_SECONDS = 15
"""Workers that read data live some seconds longer than a killed process, and keep its lock."""


class RunFolder:
    """The folder of a run. Every rank calls every method.

    Only rank 0 reads and writes, and sends the result to all ranks: their views of a network file system may differ.

    Args:
        arguments: of the run.
        resolved: all arguments as plain data.
        dropped: the faulty records that were dropped, and why; None if there are none.
    """

    def __init__(self, arguments: RunArguments, resolved: dict[str, Any], dropped: dict[str, Any] | None) -> None:
        self.path = Path(arguments.output_dir)
        self._arguments, self._resolved, self._dropped = arguments, resolved, dropped
        self._lock = FileLock(self.path / LOCK, timeout=LOCK_SECONDS)

    def is_finished(self) -> bool:
        """Whether the result is there, and is not to be overwritten."""
        finished = self.path / RESULT
        return self._first_rank_does(lambda: finished.is_file() and not self._arguments.overwrite)

    def open(self) -> Path | None:
        """Lock the folder until this process ends, and find the checkpoint to continue from, if there is one.

        Raises:
            UserError: the folder is in use, is not shared by all machines, or holds a checkpoint that does not fit.
        """
        checkpoint = self._first_rank_does(self._open_or_explain)
        own = f"rank {self._arguments.process_index} on {socket.gethostname()}"
        if blind := [rank for rank in gather_object([None if (self.path / RECORD).is_file() else own]) if rank]:
            raise UserError(f"OUTPUT {self.path} is not seen by {blind[0]}: give a folder that all machines share.")
        return checkpoint

    def _open_or_explain(self) -> Path | None:
        try:
            return self._open()
        except OSError as error:
            raise UserError(f"OUTPUT {self.path} cannot be written: {error}. Give a folder of your own.") from error

    def _open(self) -> Path | None:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(f"OUTPUT {self.path} is in use by another run: wait, or give another OUTPUT.") from None
        if self._arguments.overwrite:
            self._clear()
        if self._dropped is not None:
            write_json(self.path / DROPPED, self._dropped, sort_keys=True)
        write_json(self.path / RECORD, self._resolved, sort_keys=True)
        checkpoint, messages = find_checkpoint(self.path)
        if checkpoint:
            check_states(checkpoint)
            messages.append(f"continuing from {checkpoint}")
        for message in messages:
            sys.stderr.write(f"{message}\n")
        if checkpoint:
            prepare(checkpoint, self._arguments)
        return checkpoint

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def _first_rank_does(self, action: Callable[[], Any]) -> Any:
        return on_first_rank(self._arguments.process_index, action)


def on_first_rank(process_index: int, action: Callable[[], Any]) -> Any:
    """The result of `action` on rank 0, on all ranks; so is a UserError. Every rank calls it."""
    outcome: list[Any] = [None]
    if process_index == 0:
        try:
            outcome = [action()]
        except UserError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]
