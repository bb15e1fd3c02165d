"""What can be wrong with a set: the quick check of a run's start, and the full one of `train.validate_data`."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import Image

from llava_skip.processing import LlavaSkipProcessor
from llava_skip.vision.rgb import is_deep, is_turned
from train.data.measure import Measure, measure
from train.data.records import Fault, Record, find_fault
from train.data.sources import UNREADABLE, RecordSet

ERRORS = (
    "broken row",
    "unknown speaker",
    "turns out of order",
    "placeholders",
    "too many pictures",
    "path outside the image folder",
    "missing picture",
    "unreadable picture",
    "picture of too many pixels",
    "refused by the template",
    "picture would be cut",
    "nothing learnt",
)
"""Kinds of faults with which a record cannot be trained on."""
WARNINGS = ("empty answer", "longer than the limit", "picture of many pixels", "picture of 1 pixel")
"""Kinds with which a record is trained on, but perhaps not as was meant."""
CONVERTED = ("turned upright", "16-bit greys scaled", "CMYK converted", "palette converted", "transparency on white")
"""Kinds of pictures that are brought into RGB by more than a copy; nothing is wrong with them."""


class Finding(NamedTuple):
    """Something about a record: its row in the set, its name, a kind of the three lists above, and a sentence."""

    row: int
    record: str
    kind: str
    text: str

    @property
    def is_error(self) -> bool:
        """Whether the record cannot be trained on."""
        return self.kind in ERRORS


@dataclass
class Examined:
    """What a check found out about a record."""

    findings: list[Finding] = field(default_factory=list)
    pictures: int = 0
    measure: Measure | None = None


@dataclass(frozen=True)
class QuickCheck:
    """Structure, and that the files of the pictures exist; called with a row of the set, in any process.

    Attributes:
        records: the set.
        processor: of the model.
        max_length: rows of a sample.
    """

    records: RecordSet
    processor: LlavaSkipProcessor
    max_length: int

    @property
    def key(self) -> str:
        """Another set, or another limit, has another key."""
        parts = [type(self).__name__, self.records.fingerprint, self.max_length, *self._depends_on()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def _depends_on(self) -> list[Any]:
        return [self.processor.image_seq_length]

    def __call__(self, row: int) -> Examined:
        """Examine the record at a row."""
        record = self.records.record(row)
        fault = find_fault(record, self.processor.image_seq_length, self.max_length) or self._missing(row, record)
        if fault:
            return Examined([Finding(row, self.records.describe(row, record), *fault)])
        return self._examine_good(row, record)

    def _examine_good(self, row: int, record: Record) -> Examined:
        return Examined()

    def _missing(self, row: int, record: Record) -> Fault | None:
        pictures = self.records.images_of(row)
        for image in record["images"]:
            name = image if isinstance(image, str) else None if image.get("bytes") else image["path"]
            if name is None:
                continue
            try:
                path = pictures.path(name)
            except ValueError as error:
                return Fault("path outside the image folder", str(error))
            if not os.path.isfile(path):
                return Fault("missing picture", f"the image {path} does not exist")
        return None


@dataclass(frozen=True)
class FullCheck(QuickCheck):
    """Everything that training would read: each picture is decoded, each conversation is tokenised."""

    def _depends_on(self) -> list[Any]:
        return processor_parts(self.processor)

    def _examine_good(self, row: int, record: Record) -> Examined:
        name = self.records.describe(row, record)
        faults = [fault for image in record["images"] for fault in self._examine_picture(row, image)]
        measured = None
        if not any(fault.kind in ERRORS for fault in faults):
            try:
                measured = measure(record, self.records.images_of(row), self.processor, self.max_length)
                faults += _examine_text(record, measured, self.max_length)
            except ValueError as error:
                faults.append(Fault("refused by the template", str(error)))
        return Examined([Finding(row, name, *fault) for fault in faults], len(record["images"]), measured)

    def _examine_picture(self, row: int, image: Any) -> list[Fault]:
        name = image if isinstance(image, str) else image.get("path") or "of the table"
        pictures = self.records.images_of(row)
        try:
            with pictures.open_file(image) as picture:
                faults = [Fault(kind, f"the image {name}: {text}") for kind, text in picture_notes(picture)]
                picture.load()
            return faults
        except Image.DecompressionBombError as error:
            return [Fault("picture of too many pixels", f"the image {name}: {error}")]
        except UNREADABLE as error:
            return [Fault("unreadable picture", f"the image {name}: {error}")]


def picture_notes(picture: Image.Image) -> list[Fault]:
    """What is unusual about an opened picture."""
    width, height = picture.size
    limit = Image.MAX_IMAGE_PIXELS or width * height
    chosen = [
        (width * height > limit, "picture of many pixels", f"{width} x {height} pixels"),
        (width * height == 1, "picture of 1 pixel", "1 x 1 pixel"),
        (is_turned(picture), "turned upright", "its file says that it is turned or mirrored"),
        (is_deep(picture), "16-bit greys scaled", f"mode {picture.mode}"),
        (picture.mode == "CMYK", "CMYK converted", "mode CMYK"),
        (picture.mode == "P", "palette converted", "mode P"),
        (picture.has_transparency_data, "transparency on white", "it has transparent parts"),
    ]
    return [Fault(kind, text) for applies, kind, text in chosen if applies]


def _examine_text(record: Record, measured: Measure, max_length: int) -> list[Fault]:
    faults = []
    answers = [message["content"] for message in record["messages"] if message["role"] == "assistant"]
    if empty := sum(not answer.strip() for answer in answers):
        faults.append(Fault("empty answer", f"{empty} of {len(answers)} answers are empty"))
    if measured.cuts_image:
        text = f"{measured.rows} rows, and --max_length {max_length} would cut a picture"
        faults.append(Fault("picture would be cut", text))
    elif measured.learnt == measured.lost_learnt:
        faults.append(Fault("nothing learnt", f"none of the {min(measured.rows, max_length)} rows has a label"))
    elif measured.lost:
        text = f"{measured.rows} rows; {measured.lost} would be cut, {measured.lost_learnt} of them learnt"
        faults.append(Fault("longer than the limit", text))
    return faults


def processor_parts(processor: LlavaSkipProcessor) -> list[Any]:
    """What of a processor decides the rows of a sample: tokenizer, template, and rows of a picture."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return [vocabulary, processor.chat_template, repr(processor.image_processor), processor.image_seq_length,
            processor.crop_rows]  # fmt: skip
