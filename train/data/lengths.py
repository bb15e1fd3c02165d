"""The length of every sample in rows, pictures at their true cost: computed once, in parallel, kept in the cache."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import numpy as np
from filelock import FileLock

from llava_skip.processing import LlavaSkipProcessor
from train.data.checks import processor_parts
from train.data.measure import measure
from train.data.parallel import map_rows
from train.data.reading import cache_file
from train.data.sources import RecordSet


@dataclass(frozen=True)
class _Length:
    """The signed length of the record at a row: negative where it has no picture."""

    records: RecordSet
    processor: LlavaSkipProcessor
    max_length: int

    def __call__(self, row: int) -> int:
        record = self.records.record(row)
        measured = measure(record, self.records.images_of(row), self.processor, self.max_length)
        rows = measured.rows - measured.lost
        return rows if record["images"] else -rows


def sample_lengths(records: RecordSet, processor: LlavaSkipProcessor, max_length: int, processes: int) -> np.ndarray:
    """Rows of each sample of an epoch [N], cut to `max_length`; negative for samples without pictures.

    Raises:
        ValueError: the template refuses a conversation.
    """
    parts = [records.fingerprint, max_length, *processor_parts(processor)]
    path = cache_file(f"lengths-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.npy")
    rows = records.used_rows
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            found = map_rows(_Length(records, processor, max_length), rows, processes, "measuring samples")
            temporary = path.with_name(f".{path.stem}.{os.getpid()}.npy")
            np.save(temporary, np.fromiter(found, dtype=np.int32, count=len(rows)))
            temporary.replace(path)
    by_row = np.load(path)
    return by_row if records.rows is None else by_row[np.searchsorted(rows, records.rows)]
