"""Validation while training: which records, how their loss is computed, and when.

The loss is the mean over all supervised tokens of the validation set, whatever the batch size, the number of processes
and the padding. Nothing that training draws from or adds to is touched, so the losses of training stay the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy

from llava_skip.configuration import IGNORE_INDEX
from llava_skip.vision.values import PixelValues
from llava_skip_base.errors import UserError
from train.data import COUNTED, ConversationDataset, RecordSet, read_sources
from train.data.sources import MIX_KINDS, Source

if TYPE_CHECKING:
    from train.arguments import DataArguments, RunArguments

SUMS = ("loss", "tokens", "samples", *COUNTED)
"""What is added up over the batches of all processes: the loss of the supervised tokens, their number, ..."""


def check_validation(data: DataArguments, run: RunArguments) -> None:
    """Refuse arguments of validation that do not go together.

    Raises:
        UserError: says which one is missing or too many.
    """
    given = [name for name in ("eval_data", "eval_share") if getattr(data, name)]
    wanted = run.eval_strategy != IntervalStrategy.NO
    if len(given) == 2:
        raise UserError("--eval_data and --eval_share are both given: name other data, or a share of the same.")
    if wanted and not given:
        raise UserError("--eval_strategy needs --eval_data, or --eval_share 0.01.")
    if given and not wanted:
        raise UserError(f"--{given[0]} needs --eval_strategy steps or epoch, which says when to validate.")
    if data.eval_share and data.streaming:
        raise UserError("--eval_share needs a set that is read whole: give --eval_data, or leave out --streaming.")
    if data.eval_images and not data.eval_data:
        raise UserError("--eval_images needs --eval_data, whose images are there.")
    if run.load_best_model_at_end and run.eval_strategy == IntervalStrategy.STEPS and run.eval_steps != run.save_steps:
        raise UserError(
            "--load_best_model_at_end needs a checkpoint for each validation: leave out --eval_steps, which is then "
            f"--save_steps ({run.save_steps})."
        )


def eval_sources(data: DataArguments) -> list[Source]:
    """The sources of --eval_data, with the images of --eval_images, else of --images; a mixture names its own."""
    assert data.eval_data is not None
    mixture = Path(data.eval_data).suffix in MIX_KINDS
    return read_sources(data.eval_data, data.eval_images or ("" if mixture else data.images))


def split(records: RecordSet, share: float, seed: int) -> tuple[RecordSet, RecordSet]:
    """The records to train on and those to validate on; no record is in both, however often it is read in an epoch.

    Args:
        records: of the run.
        share: of the records, above 0 and below 1.
        seed: of the choice.

    Raises:
        UserError: one of the two would be empty.
    """
    rows = records.used_rows
    count = round(share * len(rows))
    if not 0 < count < len(rows):
        raise UserError(f"--eval_share {share} of {len(rows)} records is {count}: both parts need a record.")
    chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:count])
    return records.without(chosen.tolist()), replace(records, rows=chosen)


def rounds(with_image: Sequence[bool], batch_size: int, processes: int) -> Iterator[list[list[int]]]:
    """Batches of all processes, round by round; every sample is in exactly one of them.

    The samples of a round all have images, or none has: each process then calls the same parts of the model, as ZeRO-3
    needs.

    Args:
        with_image: of each sample.
        batch_size: most samples of a batch.
        processes: number of batches of a round; at the end some may be empty.
    """
    size = batch_size * processes
    for kind in (True, False):
        members = [index for index, has in enumerate(with_image) if has is kind]
        for start in range(0, len(members), size):
            yield [members[start : start + size][rank::processes] for rank in range(processes)]


class Validation:
    """Computes the loss of a validation set.

    Args:
        dataset: the set.
        collator: samples -> batch, as in training.
        arguments: of the run: batch size, processes, rank.
    """

    def __init__(
        self, dataset: ConversationDataset, collator: Callable[[list[dict[str, Any]]], Any], arguments: RunArguments
    ) -> None:
        self._dataset, self._collator, self._arguments = dataset, collator, arguments
        self._values = PixelValues.of(dataset.processor)
        records = dataset.records
        images = [bool(records.record(records.row(index))["images"]) for index in range(len(dataset))]
        rank = arguments.process_index
        self._batches, self._counted = [], []
        for batches in rounds(images, arguments.eval_batch_size, arguments.world_size):
            self._batches.append(batches[rank] or batches[0][:1])  # so that every process takes part in each round
            self._counted.append(bool(batches[rank]))

    @torch.no_grad()
    def measure(self, model: nn.Module, accelerator: Any, tick: Callable[[], None]) -> dict[str, float]:
        """The loss of the set, as log entries; every process calls it.

        Args:
            model: in training, as it is called there.
            accelerator: adds up over the processes.
            tick: is called after each batch.

        Raises:
            RecordError: a record cannot be read; the message names it.
            UserError: no token of the set is supervised.
        """
        began, device = time.perf_counter(), self._arguments.device
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        model.eval()
        for batch, counted in zip(self._loader(), self._counted, strict=True):
            numbers = self._numbers(model, batch)
            if counted:
                sums += numbers
            tick()
        model.train()
        totals = dict(zip(SUMS, accelerator.reduce(sums, reduction="sum").tolist(), strict=True))
        if not totals["tokens"]:
            raise UserError("no token of the validation data is supervised: give records with answers.")
        totals["loss"] /= totals["tokens"]
        return {f"eval_{name}": value for name, value in totals.items()} | {"eval_seconds": time.perf_counter() - began}

    def _loader(self) -> DataLoader:
        return DataLoader(
            self._dataset,
            batch_sampler=self._batches,
            collate_fn=self._collator,
            num_workers=self._arguments.dataloader_num_workers or 0,
            generator=torch.Generator(),  # a loader draws a number; not from the run's own generator
        )

    def _numbers(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """[len(SUMS)] of a batch."""
        batch = dict(batch)
        samples, counts = len(batch.pop("record_ids")), [batch.pop(name) for name in COUNTED]
        inputs = {name: tensor.to(self._arguments.device) for name, tensor in batch.items()}
        if self._values is not None and "pixel_values" in inputs:
            inputs["pixel_values"] = self._values(inputs["pixel_values"])
        # The sum over the tokens: a mean over one token. Of the logits, which nobody reads, only the last. With a cache
        # the samples of a --padding_free batch would be one.
        loss = model(**inputs, num_items_in_batch=1, logits_to_keep=1, use_cache=False).loss
        tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        own = [torch.as_tensor(value, dtype=torch.float64).to(loss.device) for value in (samples, *counts)]
        return torch.stack([loss.double(), tokens.double(), *own])


class AtStepEnd(TrainerCallback):
    """Has the validation of an epoch done at its last step, before the checkpoint of that step is written.

    Trainer does it later, at the end of the epoch: a run that continues from that checkpoint would leave it out.
    """

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for it at the last step of an epoch, or of the run."""
        last = state.epoch == int(state.epoch or 0) or state.global_step >= state.max_steps
        if args.eval_strategy == IntervalStrategy.EPOCH and last:
            control.should_evaluate = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """It is done."""
        control.should_evaluate = False
