"""Records -> training samples -> batches.

Shapes: T rows of a sample, B samples, N pictures.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llava_skip.configuration import IGNORE_INDEX
from llava_skip.processing import LlavaSkipProcessor
from train.data.records import Record
from train.data.sources import UNREADABLE, Pictures, RecordSet


class RecordError(ValueError):
    """A record that cannot be trained on, found when it was read; the message names it."""

    def __str__(self) -> str:
        """The message; a loader's worker hands it on below its traceback."""
        return super().__str__().rstrip().rpartition(f"{type(self).__name__}: ")[2]


COUNTED = ("truncated", "unsupervised")
"""What is counted in a batch: samples that lost rows to max_length, and samples without a learnt token."""


def encode(
    record: Record, pictures: Pictures, processor: LlavaSkipProcessor, max_length: int, name: str
) -> dict[str, Any]:
    """A record as a sample.

    Args:
        record: without a fault.
        pictures: opens its pictures.
        processor: of the model.
        max_length: rows; what is behind them is cut.
        name: of the record, for messages.

    Returns:
        `input_ids`, `labels` (lists of T), `pixel_values` [N, 3, side, side] and `crop_counts` [N] if any, `truncated`
        (lost rows), `unsupervised` (whether nothing is learnt), `record_id` (the name).

    Raises:
        RecordError: names the record whose picture cannot be read or would be cut.
    """
    try:
        images = [pictures.open(image) for image in record["images"]]
        sample = processor.encode_conversation(record["messages"], images)
    except UNREADABLE as error:
        raise RecordError(f"{name}: {error}") from error
    lost = max(0, len(sample["input_ids"]) - max_length)
    if lost and processor.image_token_id in sample["input_ids"][max_length:]:
        raise RecordError(
            f"{name} is {len(sample['input_ids'])} rows long, and cutting it to --max_length {max_length} would cut a "
            "picture: raise --max_length."
        )
    for column in ("input_ids", "labels"):
        sample[column] = sample[column][:max_length]
    learnt = any(label != IGNORE_INDEX for label in sample["labels"][1:])
    return sample | {"truncated": lost, "unsupervised": not learnt, "record_id": name}


class ConversationDataset(Dataset):
    """Records, encoded when they are read.

    `lengths` are those of `train.data.lengths`, for a sampler that groups by them; None: not needed.
    """

    def __init__(
        self, records: RecordSet, processor: LlavaSkipProcessor, max_length: int, lengths: np.ndarray | None = None
    ) -> None:
        self.records, self.processor, self.max_length, self.lengths = records, processor, max_length, lengths

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample at an index of the epoch, see `encode`; an IndexError ends a loop over the set."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a set of {len(self)} samples")
        row = self.records.row(index)
        record = self.records.record(row)
        name = self.records.describe(row, record)
        return encode(record, self.records.images_of(row), self.processor, self.max_length, name)


def collate(samples: list[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Samples -> `input_ids`, `labels`, `attention_mask` [B, T] padded right, and what `_shared` adds."""
    length = max(len(sample["input_ids"]) for sample in samples)

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([s[name] + [value] * (length - len(s[name])) for s in samples])

    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    return {
        "input_ids": padded("input_ids", pad_token_id),
        "labels": padded("labels", IGNORE_INDEX),
        "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
    } | _shared(samples)


def collate_flat(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples one behind the other in a single row, without padding: `input_ids`, `labels`, `position_ids` [1, sum T].

    Positions start again with each sample. Where there is no attention mask, transformers takes that for the end of a
    sequence: no row attends to another sample. A sample's first token is nobody's next token, so its label goes.
    """

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts)[None]

    return {
        "input_ids": joined([torch.tensor(sample["input_ids"]) for sample in samples]),
        "labels": joined([torch.tensor([IGNORE_INDEX, *sample["labels"][1:]]) for sample in samples]),
        "position_ids": joined([torch.arange(len(sample["input_ids"])) for sample in samples]),
    } | _shared(samples)


def _shared(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """`pixel_values` [N, 3, side, side] and `crop_counts` if any, `record_ids` (list), and counts of `COUNTED`."""
    shared: dict[str, Any] = {name: torch.tensor(sum(bool(sample[name]) for sample in samples)) for name in COUNTED}
    shared["record_ids"] = [sample.get("record_id") for sample in samples]
    pictures = [torch.as_tensor(p) for sample in samples for p in sample.get("pixel_values", ())]
    if pictures:
        shared["pixel_values"] = torch.stack(pictures)
    crop_counts = [torch.as_tensor(sample["crop_counts"]) for sample in samples if "crop_counts" in sample]
    if crop_counts:
        shared["crop_counts"] = torch.cat(crop_counts)
    return shared
