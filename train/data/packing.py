"""Batches of a fixed number of tokens: as many samples one after the other in a row as fit.

Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from llava_skip_base.errors import UserError


class PackSampler(Sampler[tuple[int, ...]]):
    """The batches of an epoch, each the indices of its samples; the same on every process, and for every resumption.

    Every sample comes once an epoch. Samples of equal length change places from epoch to epoch, and the batches come in
    another order; their number stays, and is a multiple of the number of processes, which take them in turn.

    Attributes:
        most: tokens of a batch.

    Args:
        lengths: [N] tokens of the samples, 1 to `most`.
        most: tokens of a batch.
        processes: of the run, as it began.
        seed: with the epoch's number, decides what is in a batch, and the order.

    Raises:
        UserError: fewer samples than processes.
    """

    def __init__(self, lengths: np.ndarray, most: int, processes: int, seed: int) -> None:
        if len(lengths) < processes:
            raise UserError(
                f"--max_tokens_per_batch gives each of {processes} processes a batch, and there are {len(lengths)} "
                "samples: start fewer processes."
            )
        self.most = most
        self._lengths, self._seed, self._epoch = lengths, seed, 0
        numbers = pack(-np.sort(-lengths), most, processes)
        self._ends = np.cumsum(np.bincount(numbers))
        self._ranks = np.argsort(numbers, kind="stable")

    def set_epoch(self, epoch: int) -> None:
        """Choose the batches of an epoch; Trainer calls it."""
        self._epoch = epoch

    @property
    def filled(self) -> float:
        """The share of the tokens of all batches that samples fill."""
        return float(self._lengths.sum()) / (self.most * len(self))

    @property
    def samples(self) -> float:
        """The mean number of samples of a batch."""
        return len(self._lengths) / len(self)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator).numpy()
        sorted_ = order[np.argsort(-self._lengths[order], kind="stable")]
        packs = np.split(sorted_[self._ranks], self._ends[:-1])
        for number in torch.randperm(len(packs), generator=generator).tolist():
            yield tuple(packs[number].tolist())

    def __str__(self) -> str:
        return (
            f"{len(self):,} batches of at most {self.most:,} tokens an epoch, {self.filled:.1%} filled, "
            f"{self.samples:.1f} samples in each"
        )


def pack(lengths: np.ndarray, most: int, processes: int) -> np.ndarray:
    """[N] the number of each sample's batch, by best fit: each sample into the batch that it fills best.

    (Johnson et al., 1974: at most 11/9 times as many batches as needed, and 4.)

    Args:
        lengths: [N] tokens of the samples, 1 to `most`, the longest first.
        most: tokens of a batch.
        processes: the number of batches is a multiple of it: batches of many samples are divided until it is.
    """
    numbers = np.empty(len(lengths), dtype=np.int64)
    by_room: list[list[int]] = [[] for _ in range(most + 1)]  # numbers of the packs that have room for so many tokens
    rooms = 0  # its bits are the rooms that packs have: the smallest one from a length on is found at once
    packs = 0
    for rank, length in enumerate(lengths.tolist()):
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, number = most, packs
            packs += 1
        numbers[rank] = number
        by_room[room - length].append(number)
        rooms |= 1 << (room - length)
    return _divided(numbers, -packs % processes)


def _divided(numbers: np.ndarray, more: int) -> np.ndarray:
    """So many packs more, again and again by every second sample of the one with the most."""
    for _ in range(more):
        counts = np.bincount(numbers)
        members = np.flatnonzero(numbers == counts.argmax())
        numbers[members[1::2]] = len(counts)
    return numbers


@dataclass
class Packed(Dataset):
    """A set whose items are the samples of whole batches."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: tuple[int, ...]) -> list[dict[str, Any]]:
        """The samples at the indices of a batch."""
        return [self.dataset[index] for index in indices]


def collate_packs(
    packs: list[list[dict[str, Any]]], collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> dict[str, Any]:
    """What a collator makes of the samples of all packs."""
    return collator([sample for members in packs for sample in members])
