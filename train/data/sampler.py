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

    Processes take batches in turn: the c-th b indices of a step go to process c mod processes.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, batches_per_step: int, seed: int) -> None:
        """Sample by lengths.

        Args:
            lengths: [N] tokens of the samples, negative where there is no image.
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
    """An order of all samples in steps of one modality; the last step has the rest of both.

    Args:
        lengths: [N], not 0, negative where there is no image.
        batch_size: b.
        batches_per_step: W.
        generator: the only source of chance.
    """
    steps = {}
    for sign in (1, -1):
        members = np.flatnonzero(lengths * sign > 0)
        order = length_order(lengths[members] * sign, batch_size, batches_per_step, generator)
        indices, size = [int(members[index]) for index in order], batch_size * batches_per_step
        steps[sign] = [indices[start : start + size] for start in range(0, len(indices), size)]
    images, text = steps[1], steps[-1]
    if not images or not text:
        return [index for step in images or text for index in step]
    whole = images[:-1] + text[:-1]
    mixed = [whole[number] for number in torch.randperm(len(whole), generator=generator).tolist()]
    return [index for step in mixed for index in step] + sorted(images[-1] + text[-1])


def length_order(lengths: np.ndarray, batch_size: int, batches_per_step: int, generator: torch.Generator) -> list[int]:
    """An order in which the batches of a step have about equal sums of lengths [N]; the steps are random."""
    order = torch.randperm(len(lengths), generator=generator).numpy()
    size, result = batch_size * batches_per_step, []
    for start in range(0, len(order), size):
        step = order[start : start + size]
        longest_first = step[np.argsort(-lengths[step], kind="stable")].tolist()
        for batch in _even_batches(longest_first, lengths, batches_per_step):
            result += batch
    return result


def _even_batches(indices: list[int], lengths: np.ndarray, count: int) -> list[list[int]]:
    """Each index goes to the batch with the smallest sum that is not full; an uneven rest is shared in turn."""
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
