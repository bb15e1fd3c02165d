"""LLaVA conversation records -> training samples -> batches.

Shapes: T rows of a sample, B samples, N pictures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from llava_skip.configuration import IGNORE_INDEX
from llava_skip.processing import IMAGE_TOKEN, LlavaSkipProcessor

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
"""Speakers of LLaVA's format -> roles of transformers'."""


def load_records(path: Path) -> list[dict[str, Any]]:
    """Read a LLaVA conversation JSON: a list of `{"id", "image" (optional), "conversations"}`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not a list of objects.
    """
    if not path.is_file():
        raise FileNotFoundError(f"DATA {path} does not exist: give a LLaVA conversation JSON file.")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"DATA {path} is not valid JSON: {error}.") from error
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"DATA {path} must hold a list of conversation objects, with at least one in it.")
    return records


def image_names(record: dict[str, Any]) -> list[str]:
    """The pictures of a record: none, one, or a list."""
    image = record.get("image")
    if image is None:
        return []
    return [image] if isinstance(image, str) else list(image)


def find_fault(record: dict[str, Any], images: Path, image_seq_length: int, max_length: int) -> str | None:
    """What is wrong with a record, in words; None if nothing is."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(t, dict) and {"from", "value"} <= set(t) for t in turns):
        return "'conversations' must be a list of turns with 'from' and 'value'"
    speakers = [turn["from"] for turn in turns]
    if unknown := sorted(set(speakers) - set(ROLES)):
        return f"unknown speakers {unknown}; known: {sorted(ROLES)}"
    spoken = [speaker for speaker in speakers if speaker != "system"]
    if not spoken or spoken != ["human", "gpt"] * (len(spoken) // 2):
        return f"turns must alternate human, gpt, ... and end with gpt; got {speakers}"
    names = image_names(record)
    placeholders = sum(turn["value"].count(IMAGE_TOKEN) for turn in turns)
    if placeholders != len(names):
        return f"{len(names)} pictures, but {placeholders} {IMAGE_TOKEN} in the text: the numbers must be the same"
    if len(names) * image_seq_length >= max_length:
        return f"{len(names)} pictures take {len(names) * image_seq_length} rows, --max_length is {max_length}"
    missing = [name for name in names if not (images / name).is_file()]
    return f"the image {images / missing[0]} does not exist" if missing else None


def check_records(records: list[dict[str, Any]], images: Path, image_seq_length: int, max_length: int) -> None:
    """Look at every record before anything is trained on it.

    Raises:
        ValueError: names the first faulty record and its fault, and counts the others.
    """
    faults = []
    for index, record in enumerate(tqdm(records, desc="checking records", disable=len(records) < 50_000)):
        fault = find_fault(record, images, image_seq_length, max_length)
        if fault:
            faults.append(f"record {index} (id {record.get('id')!r}): {fault}")
    if faults:
        more = f"\n... and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{len(faults)} of {len(records)} records are faulty:\n" + "\n".join(faults[:5]) + more)


def to_messages(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """LLaVA turns -> transformers' messages; a turn's only picture is moved to its front, as LLaVA does."""
    return [{"role": ROLES[turn["from"]], "content": _image_first(turn["value"])} for turn in turns]


def _image_first(text: str) -> str:
    if text.count(IMAGE_TOKEN) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


class ConversationDataset(Dataset):
    """Records, encoded when they are read."""

    def __init__(
        self, records: list[dict[str, Any]], images: Path, processor: LlavaSkipProcessor, max_length: int
    ) -> None:
        self.records, self.images, self.processor, self.max_length = records, images, processor, max_length

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids`, `labels` (lists of T), `pixel_values` [N, 3, side, side] if any, `truncated` (lost rows).

        Raises:
            ValueError: names the record whose picture cannot be read or would be cut.
        """
        record = self.records[index]
        try:
            pictures = [self._open(name) for name in image_names(record)]
            sample = self.processor.encode_conversation(to_messages(record["conversations"]), pictures)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"record {index} (id {record.get('id')!r}): {error}") from error
        lost = max(0, len(sample["input_ids"]) - self.max_length)
        if lost and self.processor.image_token_id in sample["input_ids"][self.max_length :]:
            raise ValueError(
                f"record {index} (id {record.get('id')!r}) is {len(sample['input_ids'])} rows long, and cutting it to "
                f"--max_length {self.max_length} would cut a picture: raise --max_length."
            )
        for name in ("input_ids", "labels"):
            sample[name] = sample[name][: self.max_length]
        return sample | {"truncated": lost}

    def _open(self, name: str) -> Image.Image:
        with Image.open(self.images / name) as picture:
            return picture.convert("RGB")


def collate(samples: list[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Samples -> `input_ids`, `labels`, `attention_mask` [B, T] padded right, `pixel_values` and `crop_counts` if any.

    `truncated` counts the samples that lost rows.
    """
    length = max(len(sample["input_ids"]) for sample in samples)

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([s[name] + [value] * (length - len(s[name])) for s in samples])

    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    batch = {
        "input_ids": padded("input_ids", pad_token_id),
        "labels": padded("labels", IGNORE_INDEX),
        "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
        "truncated": torch.tensor(sum(sample["truncated"] > 0 for sample in samples)),
    }
    pictures = [torch.as_tensor(p) for sample in samples for p in sample.get("pixel_values", ())]
    if pictures:
        batch["pixel_values"] = torch.stack(pictures)
    crop_counts = [torch.as_tensor(sample["crop_counts"]) for sample in samples if "crop_counts" in sample]
    if crop_counts:
        batch["crop_counts"] = torch.cat(crop_counts)
    return batch
