"""What can be wrong with a set: the quick check at the start of a run, and the full one of `train.validate_data`."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import Image

from llava_skip.processing import LlavaSkipProcessor
from llava_skip.vision.rgb import is_deep, is_turned, to_rgb
from llava_skip_base.errors import UserError
from llava_skip_base.images import image_name
from train.data.measure import Measure, measure, processor_parts
from train.data.records import Fault, Record, find_fault
from train.data.sources import RecordSet
from train.data.turns import RecordError

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
"""Kinds of faults with which a record cannot be trained on. Kinds are keys of the files of findings: they stay."""
FORMAT = 2
"""Raise it when the meaning or the form of findings changes: those of another number are not used again."""
WARNINGS = ("empty answer", "longer than the limit", "picture of many pixels", "picture of 1 pixel")
"""Kinds with which a record is trained on, but perhaps not as intended."""
CONVERTED = ("turned upright", "16-bit greys scaled", "CMYK converted", "palette converted", "transparency on white")
"""Informational: kinds of images whose conversion to RGB changes pixels."""


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
    """What a check found out about a record; `unread` are its columns that nothing reads."""

    findings: list[Finding] = field(default_factory=list)
    images: int = 0
    measure: Measure | None = None
    unread: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class QuickCheck:
    """Structure, and that the image files exist; called with a row of the set, in any process.

    Attributes:
        records: the set.
        processor: of the model.
        max_length: the most tokens of a sample.
    """

    records: RecordSet
    processor: LlavaSkipProcessor
    max_length: int

    @property
    def key(self) -> str:
        """Another set, or another limit, has another key."""
        parts = [FORMAT, type(self).__name__, self.records.fingerprint, self.max_length, *self._depends_on()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def _depends_on(self) -> list[Any]:
        return [self.processor.image_seq_length]

    def __call__(self, row: int) -> Examined:
        """Examine the record at a row."""
        record = self.records.record(row)
        fault = find_fault(record, self.processor.image_seq_length, self.max_length) or self._missing(row, record)
        if fault:
            return Examined([Finding(row, self.records.describe(row, record), *fault)], unread=record["unread"])
        return self._examine_good(row, record)

    def _examine_good(self, row: int, record: Record) -> Examined:
        return Examined(unread=record["unread"])

    def _missing(self, row: int, record: Record) -> Fault | None:
        images = self.records.images_of(row)
        for image in record["images"]:
            try:
                path = images.file(image)
            except RecordError as error:
                return Fault("path outside the image folder", str(error))
            if path is not None and not os.path.isfile(path):
                return Fault("missing picture", f"the image {image_name(path)} does not exist")
        return None


@dataclass(frozen=True)
class FullCheck(QuickCheck):
    """Everything that training would read: each image is decoded, each conversation is tokenised."""

    def _depends_on(self) -> list[Any]:
        return processor_parts(self.processor)

    def _examine_good(self, row: int, record: Record) -> Examined:
        faults = [fault for image in record["images"] for fault in self._examine_image(row, image)]
        measured = None
        if not any(fault.kind in ERRORS for fault in faults):
            try:
                measured = measure(record, self.records.images_of(row), self.processor, self.max_length)
            except UserError as error:
                faults.append(Fault("refused by the template", str(error)))
            else:
                faults += _examine_text(record, measured, self.max_length)
        name = self.records.describe(row, record)
        findings = [Finding(row, name, *fault) for fault in faults]
        return Examined(findings, len(record["images"]), measured, record["unread"])

    def _examine_image(self, row: int, image: Any) -> list[Fault]:
        name = image_name(image)
        try:
            with self.records.images_of(row).open_file(image) as opened:
                size = to_rgb(opened).size
                notes = image_notes(opened)
        except UserError as error:
            too_large = isinstance(error.__cause__, Image.DecompressionBombError)
            kind = "picture of too many pixels" if too_large else "unreadable picture"
            return [Fault(kind, f"the image {name}: {error}")]
        try:
            self.processor.check_image_size(*size)
        except UserError as error:
            return [Fault("picture of too many pixels", f"the image {name}: {error}")]
        return [Fault(kind, f"the image {name}: {text}") for kind, text in notes]


def image_notes(image: Image.Image) -> list[Fault]:
    """What is unusual about an opened image."""
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS or width * height
    chosen = [
        (width * height > limit, "picture of many pixels", f"{width} x {height} pixels"),
        (width * height == 1, "picture of 1 pixel", "1 x 1 pixel"),
        (is_turned(image), "turned upright", "its file says that it is turned or mirrored"),
        (is_deep(image), "16-bit greys scaled", f"mode {image.mode}"),
        (image.mode == "CMYK", "CMYK converted", "mode CMYK"),
        (image.mode == "P", "palette converted", "mode P"),
        (image.has_transparency_data, "transparency on white", "it has transparent parts"),
    ]
    return [Fault(kind, text) for applies, kind, text in chosen if applies]


def _examine_text(record: Record, measured: Measure, max_length: int) -> list[Fault]:
    faults = []
    answers = [message["content"] for message in record["messages"] if message["role"] == "assistant"]
    if empty := sum(not answer.strip() for answer in answers):
        faults.append(Fault("empty answer", f"{empty} of {len(answers)} answers are empty"))
    if measured.cuts_image:
        text = f"{measured.length} tokens, and --max_length {max_length} would cut an image"
        faults.append(Fault("picture would be cut", text))
    elif measured.supervised == measured.lost_supervised:
        faults.append(Fault("nothing learnt", f"none of the {min(measured.length, max_length)} tokens has a label"))
    elif measured.lost:
        text = f"{measured.length} tokens; {measured.lost} would be cut, {measured.lost_supervised} of them supervised"
        faults.append(Fault("longer than the limit", text))
    return faults
