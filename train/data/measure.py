"""How long a sample is and how much of it is supervised, without encoding its images."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from filelock import FileLock

from llava_skip.processing import LlavaSkipProcessor
from llava_skip.vision.rgb import upright_size
from llava_skip_base.errors import UserError
from llava_skip_base.files import write_bytes
from train.data.parallel import map_rows
from train.data.reading import cache_file
from train.data.records import Record
from train.data.sources import Images, RecordSet
from train.data.turns import RecordError


@dataclass(frozen=True)
class Measure:
    """Numbers of tokens of a sample in the language model.

    Attributes:
        length: all, with the image tokens.
        supervised: with a label.
        lost: cut by the limit.
        lost_supervised: cut, with a label.
        cuts_image: whether the limit would cut an image.
    """

    length: int
    supervised: int
    lost: int
    lost_supervised: int
    cuts_image: bool


def measure(record: Record, images: Images, processor: LlavaSkipProcessor, max_length: int) -> Measure:
    """Measure a record without a fault; an image's header is read only if its size decides its length.

    Raises:
        UserError: the template refuses the conversation, or see `Images.open_file`.
    """
    ids, supervised = processor.tokenize_conversation(record["messages"])
    is_image = ids == processor.image_token_id
    if (shown := int(is_image.sum())) != len(record["images"]):
        raise RecordError(f"the template shows {shown} of {len(record['images'])} images")
    lengths = np.ones(len(ids), dtype=np.int64)
    lengths[is_image] = [_image_length(image, images, processor) for image in record["images"]]
    supervised[:1] = False  # no token predicts the first one
    cut = lengths.cumsum() > max_length
    length = int(lengths.sum())
    return Measure(
        length=length,
        supervised=int(supervised.sum()),
        lost=max(0, length - max_length),
        lost_supervised=int((supervised & cut).sum()),
        cuts_image=bool((is_image & cut).any()),
    )


def _image_length(image: Any, images: Images, processor: LlavaSkipProcessor) -> int:
    if not processor.length_depends_on_size:
        return processor.image_length(1, 1)
    with images.open_file(image) as opened:
        return processor.image_length(*upright_size(opened))


@dataclass(frozen=True)
class _Length:
    """The signed length of the record at a row: negative where it has no image."""

    records: RecordSet
    processor: LlavaSkipProcessor
    max_length: int

    def __call__(self, row: int) -> int:
        record = self.records.record(row)
        try:
            measured = measure(record, self.records.images_of(row), self.processor, self.max_length)
        except UserError as error:
            raise RecordError(f"{self.records.describe(row, record)}: {error}") from error
        length = measured.length - measured.lost
        return length if record["images"] else -length


def sample_lengths(records: RecordSet, processor: LlavaSkipProcessor, max_length: int, processes: int) -> np.ndarray:
    """Tokens of each sample of an epoch [N], cut to `max_length`; negative for samples without images.

    They are computed once, in parallel, and kept in the cache.

    Raises:
        RecordError: a record cannot be measured; the message names it.
    """
    parts = [records.fingerprint, max_length, *processor_parts(processor)]
    path = cache_file(f"lengths-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.npy")
    rows = records.used_rows
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            found = map_rows(_Length(records, processor, max_length), rows, processes, "measuring samples")
            np.save(content := io.BytesIO(), np.fromiter(found, dtype=np.int32, count=len(rows)))
            write_bytes(path, content.getvalue())
    by_row = np.load(path)
    return by_row if records.rows is None else by_row[np.searchsorted(rows, records.rows)]


def processor_parts(processor: LlavaSkipProcessor) -> list[Any]:
    """What of a processor decides the length of a sample: tokenizer, template, and length of an image."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return [vocabulary, processor.chat_template, repr(processor.image_processor), processor.image_seq_length,
            processor.crop_rows]  # fmt: skip
