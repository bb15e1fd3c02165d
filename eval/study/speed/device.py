"""The page of a device: what it computes rightly, which attention and cache is fastest on it, and every preset."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from eval.answering.clock import device_name
from eval.study.speed.agreement import LIMITS, agreement_table, compare_with_cpu
from eval.study.speed.measuring import Rounds
from eval.study.speed.page import NOTES, Table, whole_tables
from eval.study.speed.subjects import Shape, Subject, build_subjects
from eval.study.speed.variants import attention_table, cache_table, compare_attention, compare_caches
from eval.study.speed.whole import Plan, dtype_on, measure_whole
from llava_skip.gpus import gpu_of_device

DEVICE_PARTS = ("agreement", "whole", "attention", "caches")
"""Parts of the page; the longest compilations come last."""
DEVICE_NOTES = (
    "Agreement: tiny models of the same weights on this device and, in float32, on a CPU. Differences are shares of "
    "the largest logit, of the loss and of a gradient's norm. They agree up to "
    f"{', '.join(f'{limit:g} in {dtype}' for dtype, limit in LIMITS.items())}, or up to twice what a CPU has in the "
    "same format: there, near ties of the merge can fall the other way.",
    *NOTES,
    "MFU is the FLOPs of forward and backward, without recomputing and optimizer, over the peak of the data sheet.",
    "Caches: tokens a second of generate; with a static cache, transformers compiles decode steps and replays them as "
    "CUDA graphs.",
)


@dataclass(frozen=True)
class DeviceStudy:
    """What the page measures.

    Attributes:
        device: cpu or cuda.
        size: of the presets; agreement is measured with tiny ones.
        presets: that are measured whole.
        compared: presets of the comparisons of attention and caches.
        attention: implementations.
        shape: of a batch.
        rounds: of each measurement.
        steps: new tokens.
    """

    device: str
    size: str
    presets: Sequence[str]
    compared: Sequence[str]
    attention: Sequence[str]
    shape: Shape
    rounds: Rounds
    steps: int

    def measure(self, part: str) -> Any:
        """One of `DEVICE_PARTS`, as plain data; what it built is given back before it returns."""
        found = {
            "agreement": self._agreement,
            "whole": self._whole,
            "attention": self._attention,
            "caches": self._caches,
        }[part]()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return found

    def _subjects(self, presets: Sequence[str], stock: bool = False) -> list[Subject]:
        return build_subjects(presets, self.size, self.device, dtype_on(self.device), stock)

    def _agreement(self) -> list[dict[str, Any]]:
        return compare_with_cpu(self.presets, self.device)

    def _whole(self) -> dict[str, Any]:
        outcome = measure_whole(
            self._subjects(self.presets, stock=True), Plan(self.shape, self.rounds, steps=self.steps)
        )
        gpu = gpu_of_device(device_name(self.device))
        for row in outcome.rows:
            if gpu is not None and "tflops_a_second" in row:
                row["mfu"] = row["tflops_a_second"] / gpu.tflops
        return asdict(outcome)

    def _attention(self) -> list[dict[str, Any]]:
        return compare_attention(self._subjects(self.compared), self.attention, self.shape, self.rounds)

    def _caches(self) -> list[dict[str, Any]]:
        return compare_caches(self._subjects(self.compared), (1, 16), self.shape, self.steps, self.rounds)


def device_tables(sections: Mapping[str, Any]) -> dict[str, Table]:
    """The tables of the parts that are there, by title."""
    tables: dict[str, Table] = {}
    if rows := sections.get("agreement"):
        tables["agreement with a CPU"] = agreement_table(rows)
    if found := sections.get("whole"):
        tables |= whole_tables(found)
    if rows := sections.get("attention"):
        tables["attention implementations"] = attention_table(rows)
    if rows := sections.get("caches"):
        tables["caches of generate"] = cache_table(rows)
    return tables


def page_name(name: str, device: str) -> str:
    """The file's name without its ending: `gpu-nvidia-h100-80gb-hbm3`."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{'gpu' if device == 'cuda' else 'cpu'}-{words}"
