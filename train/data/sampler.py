"""Sampling in which the samples of a step have one modality and similar lengths, as LLaVA trains.

Shapes: N samples, b samples a batch, W batches of a step (processes times accumulation), M = W * b.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


class ModalityLengthSampler(Sampler[int]):
    """Indices of an epoch; the same on every process, and for every resumption of the epoch.

    Batches are dealt out in turn: the c-th b indices of a step go to process c mod processes.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, batches_per_step: int, seed: int) -> None:
        """Sample by lengths.

        Args:
            lengths: [N] rows of the samples, negative where there is no picture.
            batch_size: b.
            batches_per_step: W.
            seed: with the epoch's number, decides the order.
        """
        self.lengths, self.batch_size, self.batches_per_step, self.seed = lengths, batch_size, batches_per_step, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from modality_order(self.lengths, self.batch_size, self.batches_per_step, generator)


def modality_order(
    lengths: np.ndarray, batch_size: int, batches_per_step: int, generator: torch.Generator
) -> list[int]:
    """An order of all samples in steps of one modality, but for a last step of what is left of both.

    Args:
        lengths: [N], not 0, negative where there is no picture.
        batch_size: b.
        batches_per_step: W.
        generator: the only source of chance.
    """
    steps = {}
    for sign in (1, -1):
        members = np.flatnonzero(lengths * sign > 0)
        order = length_order(lengths[members] * sign, batch_size, batches_per_step, generator)
        indices, size = [int(members[place]) for place in order], batch_size * batches_per_step
        steps[sign] = [indices[start : start + size] for start in range(0, len(indices), size)]
    pictures, text = steps[1], steps[-1]
    if not pictures or not text:
        return [index for step in pictures or text for index in step]
    whole = pictures[:-1] + text[:-1]
    mixed = [whole[place] for place in torch.randperm(len(whole), generator=generator).tolist()]
    return [index for step in mixed for index in step] + sorted(pictures[-1] + text[-1])


def length_order(lengths: np.ndarray, batch_size: int, batches_per_step: int, generator: torch.Generator) -> list[int]:
    """An order in which the batches of a step have about equal sums of lengths [N]; steps are drawn by chance."""
    order = torch.randperm(len(lengths), generator=generator).numpy()
    size, result = batch_size * batches_per_step, []
    for start in range(0, len(order), size):
        step = order[start : start + size]
        longest_first = step[np.argsort(-lengths[step], kind="stable")].tolist()
        for batch in _even_batches(longest_first, lengths, batches_per_step):
            result += batch
    return result


def _even_batches(indices: list[int], lengths: np.ndarray, count: int) -> list[list[int]]:
    """Each index in turn goes to the batch with the smallest sum that is not full; leftovers are dealt out."""
    if len(indices) % count:
        return [indices[first::count] for first in range(count)]
    batches: list[list[int]] = [[] for _ in range(count)]
    sums = [(0, batch) for batch in range(count)]
    for index in indices:
        total, batch = heapq.heappop(sums)
        batches[batch].append(index)
        if len(batches[batch]) < len(indices) // count:
            heapq.heappush(sums, (total + int(lengths[index]), batch))
    return batches
