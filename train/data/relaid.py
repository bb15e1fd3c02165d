"""The samples of a run that continues on another number of processes, in the order in which they would have come."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from llava_skip.configuration import IGNORE_INDEX
from train.data.dataset import FLAGS


@dataclass
class Relaid(Dataset):
    """Samples of a set, and behind them the same samples again without anything that is learned."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample at an index; from the length on, one that counts for nothing in the loss."""
        if index < len(self.dataset):
            return self.dataset[index]
        sample = self.dataset[index - len(self.dataset)]
        return sample | {"labels": [IGNORE_INDEX] * len(sample["labels"])} | dict.fromkeys(FLAGS, 0)


@dataclass
class Rounds(Sampler[int]):
    """The order of an epoch with the end that the processes gave it with which the run began.

    The end of an epoch is filled up with its first samples until all processes have a whole batch (or cut, under
    `drop_last`). Where the processes of now need more, samples come that count for nothing in the loss.

    Attributes:
        order: of the epoch, without an end.
        begun: samples that all processes of the run's beginning computed at once.
        own: samples that all processes compute at once now.
        drop_last: whether the end is cut.
    """

    order: Any
    begun: int
    own: int
    drop_last: bool

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Trainer calls it."""
        self.order.set_epoch(epoch)

    def _whole(self) -> int:
        """Samples of the epoch that are learned."""
        rounds, rest = divmod(len(self.order), self.begun)
        return self.begun * (rounds + (rest > 0 and not self.drop_last))

    def __len__(self) -> int:
        return self.own * -(-self._whole() // self.own)

    def __iter__(self) -> Iterator[int]:
        indices = list(self.order)
        yield from itertools.islice(itertools.cycle(indices), self._whole())
        silent = [index + len(indices) for index in indices]
        yield from itertools.islice(itertools.cycle(silent), len(self) - self._whole())


def order_of(loader: DataLoader) -> Any:
    """The sampler behind a loader that `accelerate` has divided among processes."""
    batches: Any = loader.batch_sampler
    return getattr(batches, "batch_sampler", batches).sampler
