"""Metrics of a run: counts of what was computed, rates, time spent waiting, memory, and MFU.

Counts are added up on the device and read once a logging window, so that no step waits for the device.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llava_skip.configuration import IGNORE_INDEX, LlavaSkipConfig
from llava_skip.flops import decoder_flops
from llava_skip.gpus import gpu_of_device
from train.data import COUNTED

COUNTS = ("rows", "squared_rows", "ffn_rows", "supervised", "samples", *COUNTED)
"""Names of the sums, in files too: tokens without padding ("rows"), squares of a sample's number of tokens, tokens that
went through the FFN, supervised tokens, samples, `COUNTED`."""


def peak_tflops(device: torch.device, given: float | None = None) -> float | None:
    """The bfloat16 peak of a device in TFLOPs a second: `given`, else from the table; None if it is unknown."""
    if given is not None or device.type != "cuda":
        return given
    gpu = gpu_of_device(torch.cuda.get_device_name(device))
    return None if gpu is None else float(gpu.tflops)


def memory_peak(device: torch.device) -> float:
    """GiB: on a GPU the peak allocation since the last call, otherwise the peak resident memory of this process."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


class Meter:
    """Counts of one logging window on this rank, and totals of the run over all ranks.

    Attributes:
        last_wait: of the last window, how long the rank that waited longest waited for batches, and all seconds.

    Args:
        config: the model's.
        trainable: whether the language model's own weights are, which decides what a backward pass costs.
        device: of this rank.
        peak: bfloat16 peak of one device in TFLOPs a second, if known.
        gather: a vector of this rank [n] -> the vectors of all ranks [ranks, n].
    """

    def __init__(
        self,
        config: LlavaSkipConfig,
        trainable: bool,
        device: torch.device,
        peak: float | None,
        gather: Callable[[Tensor], Tensor],
    ) -> None:
        skip = config.skip_config
        self._text = config.text_config
        layers = self._text.num_hidden_layers
        self._skipping = skip.mean_num_skipping(layers) if skip else 0.0
        self._before_last = skip.mean_num_skipping(max(layers - 1, 1)) / (self._skipping or 1) if skip else 0.0
        self._passes = 3 if trainable else 2
        self._device, self._peak, self._gather = device, peak, gather
        self.totals: dict[str, float] = dict.fromkeys((*COUNTS, "seconds"), 0.0)
        self._started: float | None = None
        self.last_wait = (0.0, 0.0)
        self._reset()

    def _reset(self) -> None:
        self._counts: dict[str, Any] = dict.fromkeys(COUNTS, 0)
        self._waited = 0.0

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches; the time until each of them comes is counted as waiting for data."""
        self._started = self._started or time.perf_counter()
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around work that is no training: its time is not counted."""
        began = time.perf_counter()
        yield
        if self._started:
            self._started += time.perf_counter() - began

    def count(self, inputs: dict[str, Tensor]) -> None:
        """Add a micro batch."""
        tokens, squares, samples = _sizes(inputs)
        counted = inputs.get("crop_counts", inputs.get("pixel_values", inputs.get("vision_features")))
        images = 0 if counted is None else len(counted)
        self._counts["rows"] += tokens
        self._counts["squared_rows"] += squares
        self._counts["ffn_rows"] += tokens - images * self._skipping
        self._counts["supervised"] += (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        self._counts["samples"] += samples
        for name in COUNTED:
            self._counts[name] += inputs.get(name, 0)

    def _sums(self) -> tuple[dict[str, float], float, float]:
        """Counts of the window over all ranks, with its seconds; the longest wait and the largest memory of a rank."""
        seconds = time.perf_counter() - self._started if self._started else 0.0
        own = [*(float(self._counts[name]) for name in COUNTS), self._waited, memory_peak(self._device)]
        ranks = self._gather(torch.tensor([own], dtype=torch.float64, device=self._device))
        counts = dict(zip(COUNTS, ranks.sum(dim=0).tolist(), strict=False)) | {"seconds": seconds}
        self._ranks = ranks.shape[0]
        return counts, ranks[:, -2].max().item(), ranks[:, -1].max().item()

    def close_window(self) -> dict[str, float]:
        """Metrics of the window over all ranks; starts the next window. Every rank must call it."""
        counts, waited, memory = self._sums()
        self.last_wait = waited, counts["seconds"]
        self.totals = _added(self.totals, counts)
        self._started = time.perf_counter()
        self._reset()
        metrics = rates(counts) | {"data_wait_seconds": waited, "memory_peak_gib": memory}
        if self._peak and counts["seconds"]:
            available = counts["seconds"] * self._peak * 1e12 * self._ranks
            metrics["mfu"] = self._flops(counts) / available
        return metrics

    def _flops(self, counts: dict[str, float]) -> float:
        """Matrix products of the language model in the forward and backward pass, without padding and recomputation."""
        tokens = round(counts["rows"])
        keys = round(counts["squared_rows"] / max(tokens, 1))
        read = round(counts["supervised"])
        ffn = counts["rows"] - (counts["rows"] - counts["ffn_rows"]) * self._before_last  # a layer before the last one
        once = decoder_flops(self._text, tokens, ffn, read, keys=keys, last_ffn_tokens=read)
        return self._passes * once.total

    def so_far(self) -> dict[str, float]:
        """Totals of the run over all ranks, the open window included. Every rank must call it."""
        return _added(self.totals, self._sums()[0])


def _sizes(inputs: dict[str, Tensor]) -> tuple[Any, Any, Any]:
    """Tokens of a micro batch without padding, the sum of their squares by sample, and the number of samples."""
    if "attention_mask" in inputs:
        lengths = inputs["attention_mask"].sum(dim=1, dtype=torch.float64)
        return lengths.sum(), lengths.square().sum(), lengths.shape[0]
    positions = inputs["position_ids"]  # samples one after the other; the first n odd numbers add up to n squared
    return positions.numel(), (2 * positions.double() + 1).sum(), (positions == 0).sum()


def rates(counts: dict[str, float]) -> dict[str, float]:
    """Rates from counts and seconds; `tokens_per_second` counts all tokens of the language model, visual ones too."""
    seconds, tokens = counts["seconds"], max(counts["rows"], 1.0)
    return {
        "tokens_per_second": counts["rows"] / seconds if seconds else 0.0,
        "samples_per_second": counts["samples"] / seconds if seconds else 0.0,
        "skipped_ffn_share": 1 - counts["ffn_rows"] / tokens,
    }


def _added(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    return {name: first[name] + second[name] for name in first}
