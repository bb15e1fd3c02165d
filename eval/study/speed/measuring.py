"""How time and memory are measured, for every mode of `bench`.

On a CPU time is what one process spent computing, with one thread: other programs make it longer only through shared
caches and memory. On a GPU it is the time between two moments at which its queue is empty.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from llava_skip_base.files import read_json
from llava_skip_base.texts import one_line, shortened


@dataclass(frozen=True)
class Spread:
    """Times of one call, in seconds, in the order in which they were measured."""

    seconds: tuple[float, ...]

    @property
    def minimum(self) -> float:
        """The fastest: what the call takes when nothing else disturbs it."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """How far the median is above the fastest, as a share of it."""
        return statistics.median(self.seconds) / self.minimum - 1


Measured = Callable[[], Mapping[str, float]]
"""Makes one call of something; returns seconds by name of what was measured in it."""


def clock(device: torch.device) -> Callable[[], float]:
    """The clock of a device in seconds: of a GPU when all its work is done, of a CPU the process's computing time."""
    if device.type == "cpu":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def timed(name: str, call: Callable[[], Any], device: torch.device) -> Measured:
    """`call` as something to measure under `name`."""
    now = clock(device)

    def measured() -> dict[str, float]:
        start = now()
        call()
        return {name: now() - start}

    return measured


@dataclass(frozen=True)
class Rounds:
    """How often something is measured.

    Attributes:
        least: rounds in any case.
        seconds: short calls get more rounds, until this time has passed, but at most ten times `least`.
    """

    least: int = 3
    seconds: float = 1.0

    def __iter__(self) -> Iterator[int]:
        end = time.monotonic() + self.seconds
        for number in range(10 * self.least):
            if number >= self.least and time.monotonic() > end:
                break
            yield number


def take_turns(calls: Mapping[str, Measured], rounds: Rounds, label: str) -> dict[str, dict[str, Spread] | str]:
    """Measure calls, one after the other in each round, so that a change of the machine's speed meets all of them.

    Args:
        calls: by name; each has been called before.
        rounds: how many.
        label: of the progress bar.

    Returns:
        For each name the times of what it measures, or why it failed: for example for want of memory.
    """
    times: dict[str, list[Mapping[str, float]]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    for _ in tqdm(rounds, desc=label, disable=None):
        gc.collect()
        for name, call in calls.items():
            if name not in failed:
                try:
                    times[name].append(call())
                except torch.OutOfMemoryError as error:
                    failed[name] = one_line(error, 1)
    return {
        name: failed[name] if name in failed else {kind: Spread(tuple(t[kind] for t in own)) for kind in own[0]}
        for name, own in times.items()
    }


def try_call(call: Callable[[], Any], expected: Sequence[type[Exception]] = (torch.OutOfMemoryError,)) -> Any:
    """What a call returns, or the first line of an expected error as text."""
    try:
        return call()
    except tuple(expected) as error:
        return shortened(f"{type(error).__name__}: {one_line(error, 1)}", 120)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that one call holds at one time beyond those that were held before it.

    On a CPU, torch's profiler notes each allocation of a tensor, so the number does not depend on the allocator.
    """
    if device.type != "cpu":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [event for event in read_json(path)["traceEvents"] if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The b of value = a * size^b that fits best: the slope of the logarithms by least squares."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(own) for own in values]).slope
