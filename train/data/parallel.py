"""A function over many rows, in several processes, in order, with progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

Result = TypeVar("Result")

CHUNK = 64
"""Rows that a process takes at once."""
WORTH_PROCESSES = 4096
"""Fewer rows are done before the processes have started."""


class _Calls(Dataset, Generic[Result]):
    def __init__(self, function: Callable[[int], Result], rows: np.ndarray) -> None:
        self.function, self.rows = function, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Result:
        return self.function(int(self.rows[index]))


def map_rows(function: Callable[[int], Result], rows: np.ndarray, processes: int, title: str) -> Iterator[Result]:
    """`function(row)` for each row, in their order.

    The processes are those of torch's DataLoader, as in training: one that dies is an error here.

    Args:
        function: what it refers to is shared with the processes, not copied.
        rows: their numbers.
        processes: 0 and 1 stay in this process.
        title: of the progress bar, which is shown if there are many rows.
    """
    processes = processes if processes > 1 and len(rows) >= WORTH_PROCESSES else 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    own = torch.Generator()  # a loader draws a number; not from the run's own generator
    loader: Any = DataLoader(_Calls(function, rows), CHUNK, num_workers=processes, collate_fn=list, generator=own)
    with tqdm(total=len(rows), desc=title, disable=len(rows) < WORTH_PROCESSES or None, delay=2) as bar:
        for results in loader:
            yield from results
            bar.update(len(results))


def usable_cores() -> int:
    """Cores that this process may use; all of the machine where the system does not say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_processes() -> int:
    """Processes for work on the data: the cores of this process, at most 8."""
    return min(8, usable_cores())
