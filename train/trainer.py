"""transformers' Trainer, with counts of what was computed."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from llava_skip.configuration import IGNORE_INDEX

COUNTS = ("rows", "ffn_rows", "supervised", "samples", "truncated")
"""What is counted, over all ranks: real rows, rows that took the FFN, rows with a label, samples, cut samples."""


class SkipTrainer(Trainer):
    """Counts rows as it trains; `throughput()` adds them up over all ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counts: dict[str, Any] = dict.fromkeys(COUNTS, 0)
        self._started: float | None = None
        config = self.model.config
        skip = config.skip_config
        self._skipping = skip.mean_skipping_rows(config.text_config.num_hidden_layers) if skip else 0.0

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The model's loss; counts the batch on the way."""
        if self._started is None:
            self._started = time.perf_counter()
        self._count(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _count(self, inputs: dict[str, Tensor]) -> None:
        # Tensors are added up where they are, so counting waits for no device.
        rows = inputs["attention_mask"].sum()
        counted = inputs.get("crop_counts", inputs.get("pixel_values"))
        pictures = 0 if counted is None else counted.shape[0]
        self._counts["rows"] += rows
        self._counts["ffn_rows"] += rows - pictures * self._skipping
        self._counts["supervised"] += (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        self._counts["samples"] += inputs["input_ids"].shape[0]
        self._counts["truncated"] += inputs.pop("truncated", 0)

    def throughput(self) -> dict[str, float]:
        """Sums over all ranks since the first step of this process, and rates from them."""
        seconds = time.perf_counter() - (self._started or time.perf_counter())
        local = torch.tensor([float(self._counts[name]) for name in COUNTS], device=self.args.device)
        total = dict(zip(COUNTS, self.accelerator.reduce(local, reduction="sum").tolist(), strict=True))
        rows = max(total["rows"], 1.0)
        return total | {
            "seconds": seconds,
            "rows_per_second": total["rows"] / seconds if seconds else 0.0,
            "samples_per_second": total["samples"] / seconds if seconds else 0.0,
            "skipped_share": 1 - total["ffn_rows"] / rows,
        }
