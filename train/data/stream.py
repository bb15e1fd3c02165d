"""Records that are read as they are needed, for sets that do not fit a disk.

A stream never ends: it starts again, in another order, and --max_steps says how long a run is. Each process and each of
its loader workers takes every n-th record, so no two read the same one, and none waits for another at the end.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from llava_skip.processing import LlavaSkipProcessor
from llava_skip_base.errors import UserError
from llava_skip_base.texts import plain
from train.data.dataset import encode
from train.data.reading import stream_table
from train.data.records import as_record
from train.data.sources import Images, Source
from train.data.turns import RecordError

MOST_FAULTY = 1000
"""Number of faulty records, one after the other, at which a stream stops even if it may skip them."""

logger = logging.getLogger(__name__)


@dataclass
class ConversationStream(IterableDataset):
    """Samples of a mixture, without an end.

    Attributes:
        sources: weights are the relative frequencies of their records.
        processor: of the model.
        max_length: the most tokens of a sample.
        drop_faulty: skip faulty records, each with a warning in the log, instead of stopping.
        shuffle_buffer: number of records among which the order is shuffled.
        seed: of the order.
        rank: of this process.
        processes: number of processes that share the stream.
        as_bytes: whether pixels stay bytes.
    """

    sources: list[Source]
    processor: LlavaSkipProcessor
    max_length: int
    drop_faulty: bool = False
    shuffle_buffer: int = 10_000
    seed: int = 0
    rank: int = 0
    processes: int = 1
    as_bytes: bool = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Samples, as `encode` gives them.

        Raises:
            RecordError: names a faulty record, unless they are skipped; or `MOST_FAULTY` were.
        """
        worker = get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        first, step = self.rank * workers + own, self.processes * workers
        images, faulty = [Images(source) for source in self.sources], 0  # in a row
        for number, (source, row) in enumerate(self._rows()):
            if number % step != first:
                continue
            record = as_record(row)
            name = f"record {number} of the stream, of {self.sources[source].name} (id {record['id']!r})"
            try:
                sample = encode(record, images[source], self.processor, self.max_length, name, self.as_bytes)
            except RecordError as error:
                faulty += 1
                if not self.drop_faulty or faulty == MOST_FAULTY:
                    raise
                logger.warning("skipped: %s", plain(error))
            else:
                yield sample | {"faulty": faulty}
                faulty = 0

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows with the number of their source, drawn by weight; the same on every process."""
        weights = np.array([source.weight for source in self.sources])
        chance = np.random.default_rng(self.seed)
        endless = [self._endless(source) for source in self.sources]
        while True:
            for number in chance.choice(len(endless), size=1024, p=weights / weights.sum()).tolist():
                yield number, next(endless[number])

    def _endless(self, source: Source) -> Iterator[dict[str, Any]]:
        for epoch in itertools.count():
            table, row = stream_table(source.path, source.split, source.config), None
            shuffled = table.shuffle(seed=self.seed + epoch, buffer_size=self.shuffle_buffer)
            # In batches: in a plain loop `datasets` gives each of the loader's workers whole files.
            for batch in shuffled.iter(batch_size=16):
                for values in zip(*batch.values(), strict=True):
                    row = dict(zip(batch, values, strict=True))
                    yield row
            if row is None:
                raise UserError(f"DATA {source.path} has no records.")


def stream_loader(stream: ConversationStream, arguments: Any, collator: Any) -> DataLoader:
    """A loader of this process's share of a stream.

    Args:
        stream: what is read.
        arguments: of Trainer: processes, batch size and workers.
        collator: samples -> batch.
    """
    stream.rank, stream.processes = arguments.process_index, arguments.world_size
    return DataLoader(
        stream,
        batch_size=arguments.train_batch_size,
        num_workers=arguments.dataloader_num_workers,
        collate_fn=collator,
        pin_memory=arguments.dataloader_pin_memory,
        persistent_workers=arguments.dataloader_persistent_workers,
        prefetch_factor=arguments.dataloader_prefetch_factor,
    )
