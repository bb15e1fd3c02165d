"""Records -> training samples -> batches.

Shapes: T tokens of a sample, B samples, N images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llava_skip.configuration import IGNORE_INDEX
from llava_skip.processing import LlavaSkipProcessor
from llava_skip_base.errors import UserError
from train.data.records import Record, find_fault
from train.data.sources import Images, RecordSet
from train.data.turns import RecordError

FLAGS = ("truncated", "unsupervised", "unread")
COUNTED = (*FLAGS, "faulty")
"""What is counted in a batch: samples that were cut to max_length, without a supervised token, and with columns that
nothing reads; and the faulty records that a stream passed over before its samples."""


def encode(
    record: Record, images: Images, processor: LlavaSkipProcessor, max_length: int, name: str, as_bytes: bool = False
) -> dict[str, Any]:
    """A record as a sample.

    Args:
        record: in the form of `train.data.records`.
        images: opens its images.
        processor: of the model.
        max_length: tokens of a sample; later ones are cut.
        name: of the record, for messages.
        as_bytes: whether pixels stay bytes; `PixelValues` makes values of them on a device.

    Returns:
        `input_ids`, `labels` (lists of T), `pixel_values` [N, 3, side, side] and `crop_counts` [N] if any, `truncated`
        (tokens that were cut), `unsupervised` (whether no token is supervised), `unread` (whether it has columns that
        nothing reads), `record_id` (the name).

    Raises:
        RecordError: the record is faulty, or an image cannot be read or would be cut; the message names it.
    """
    if fault := find_fault(record, processor.image_seq_length, max_length):
        raise RecordError(f"{name}: {fault.text}")
    try:
        opened = [images.open(image) for image in record["images"]]
        for image in opened:
            processor.check_image_size(*image.size)
        sample = processor.encode_conversation(record["messages"], opened, as_bytes)
    except UserError as error:
        raise RecordError(f"{name}: {error}") from error
    lost = max(0, len(sample["input_ids"]) - max_length)
    if lost and processor.image_token_id in sample["input_ids"][max_length:]:
        raise RecordError(
            f"{name} is {len(sample['input_ids'])} tokens long, and cutting it to --max_length {max_length} would cut "
            "an image: raise --max_length."
        )
    for column in ("input_ids", "labels"):
        sample[column] = sample[column][:max_length]
    supervised = any(label != IGNORE_INDEX for label in sample["labels"][1:])
    unread = bool(record["unread"])
    return sample | {"truncated": lost, "unsupervised": not supervised, "unread": unread, "record_id": name}


class ConversationDataset(Dataset):
    """Records, encoded when they are read.

    `lengths` are what `sample_lengths` gives, for a sampler that groups by them; None: not needed. With `as_bytes`
    pixels stay bytes.
    """

    def __init__(
        self,
        records: RecordSet,
        processor: LlavaSkipProcessor,
        max_length: int,
        lengths: np.ndarray | None = None,
        as_bytes: bool = False,
    ) -> None:
        self.records, self.processor, self.max_length, self.lengths = records, processor, max_length, lengths
        self.as_bytes = as_bytes

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample at an index of the epoch, see `encode`; an IndexError ends a loop over the set."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a set of {len(self)} samples")
        row = self.records.row(index)
        record = self.records.record(row)
        name = self.records.describe(row, record)
        return encode(record, self.records.images_of(row), self.processor, self.max_length, name, self.as_bytes)


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
    """Samples one after the other in one sequence, no padding: `input_ids`, `labels`, `position_ids` [1, sum T].

    Positions start again with each sample. Without an attention mask transformers starts a sequence there: no token
    attends to another sample. No token predicts the first one of a sample, so its label is removed.
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
    shared: dict[str, Any] = {name: torch.tensor(sum(bool(sample[name]) for sample in samples)) for name in FLAGS}
    shared["faulty"] = torch.tensor(sum(sample.get("faulty", 0) for sample in samples))
    shared["record_ids"] = [sample.get("record_id") for sample in samples]
    pixels = [torch.as_tensor(image) for sample in samples for image in sample.get("pixel_values", ())]
    if pixels:
        shared["pixel_values"] = torch.stack(pixels)
    crop_counts = [torch.as_tensor(sample["crop_counts"]) for sample in samples if "crop_counts" in sample]
    if crop_counts:
        shared["crop_counts"] = torch.cat(crop_counts)
    return shared
