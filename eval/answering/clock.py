"""Measures a call of `generate` without making it slower: a GPU is waited for once, at the end."""

import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from llava_skip_base.machine import peak_memory, restart_peak_memory


class Clock(LogitsProcessor):
    """Reads the time now, at the first logits, and at the end; transformers calls it with the logits of each step."""

    def __init__(self, device: torch.device, read: Callable[[], float] = time.perf_counter) -> None:
        """Starts now.

        Args:
            device: where `generate` runs.
            read: the clock where that is a CPU, in seconds.
        """
        self._device, self._read = device, read
        self._is_cuda = device.type == "cuda"
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self._is_new_peak = restart_peak_memory()
        self._marks = [self._mark()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits [B, V] as they are."""
        if len(self._marks) == 1:
            self._marks.append(self._mark())
        return scores

    def stop(self) -> tuple[float, float]:
        """Seconds to the first logits, and from there to now."""
        self._marks.append(self._mark())
        if not self._is_cuda:
            start, first, end = self._marks
            return first - start, end - first
        self._marks[-1].synchronize()
        start, first, end = self._marks
        return start.elapsed_time(first) / 1000, first.elapsed_time(end) / 1000

    def peak_memory(self) -> tuple[int, str]:
        """The most bytes since the start at one time, and what they are."""
        if self._is_cuda:
            return torch.cuda.max_memory_allocated(self._device), "torch.cuda.max_memory_allocated during a batch"
        since = "during a batch" if self._is_new_peak else "since its start"
        return peak_memory(), f"peak resident memory of the process {since}"

    def _mark(self) -> Any:
        """A point in time of the device: a GPU runs behind, so it is one in its queue."""
        if not self._is_cuda:
            return self._read()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def device_name(device: str | torch.device) -> str:
    """The processor's name, for people."""
    if torch.device(device).type != "cpu":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
