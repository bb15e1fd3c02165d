"""Batches beside the device: how many workers read them, and a warning if the device waits for them."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from tqdm import tqdm

from llava_skip_base.machine import usable_cores

MOST_WORKERS, FEWEST_WORKERS = 4, 2
"""Of a process with a device; an image takes one of them about 10 ms, decoded and resized."""
WAITING_SHARE = 0.05
"""Of a logging window's time, from which on waiting for batches is worth a warning."""


def cores_of_a_process() -> int:
    """Cores of this machine for each of a run's processes here."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def set_workers(arguments: Any) -> None:
    """Decide what a run leaves open: with a device a worker for each core, 2 to 4, for the whole run; else none.

    On a CPU the cores compute.

    Args:
        arguments: of Trainer; `dataloader_num_workers` and `dataloader_persistent_workers` are None where open.
    """
    has_device = not arguments.use_cpu and torch.accelerator.is_available()
    if arguments.dataloader_num_workers is None:
        most = max(FEWEST_WORKERS, min(MOST_WORKERS, cores_of_a_process() - 1))
        arguments.dataloader_num_workers = most if has_device else 0
    if arguments.dataloader_persistent_workers is None:
        arguments.dataloader_persistent_workers = has_device and arguments.dataloader_num_workers > 0


class DataWait:
    """Says once that a device waits for batches, and what helps.

    A run on a CPU without workers reads its batches itself: that is work, and no waiting.

    Args:
        device: of the run.
        workers: of its loader.
    """

    def __init__(self, device: torch.device, workers: int) -> None:
        self._workers = workers
        self._windows: int | None = 0 if workers or device.type != "cpu" else None
        """How many were looked at; None: no more are."""

    def note(self, waited: float, seconds: float) -> None:
        """Look at a logging window.

        Args:
            waited: seconds that the rank that waited longest waited for batches.
            seconds: of the window.
        """
        if self._windows is None:
            return
        self._windows += 1
        if self._windows == 1 or waited <= WAITING_SHARE * seconds:  # workers start in the first one
            return
        self._windows = None
        cores = cores_of_a_process()
        cure = f"raise --dataloader_num_workers, which is {self._workers}: a process has {cores} cores here"
        if self._workers >= cores:
            cure = f"the {self._workers} workers use all {cores} cores of a process: make the images smaller"
        share = f"{waited / seconds:.0%} of the last steps' time went into waiting for batches"
        tqdm.write(f"warning: {share}; {cure} (docs/training.md).", file=sys.stderr)
