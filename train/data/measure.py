"""How long a sample is and what of it is learnt, without encoding its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_skip.processing import LlavaSkipProcessor
from llava_skip.vision.rgb import upright_size
from train.data.records import Record
from train.data.sources import Pictures


@dataclass(frozen=True)
class Measure:
    """Rows of a sample in the language model.

    Attributes:
        rows: all, pictures included.
        learnt: with a label.
        lost: cut by the limit.
        lost_learnt: cut, with a label.
        cuts_image: whether the limit would cut a picture.
    """

    rows: int
    learnt: int
    lost: int
    lost_learnt: int
    cuts_image: bool


def measure(record: Record, pictures: Pictures, processor: LlavaSkipProcessor, max_length: int) -> Measure:
    """Measure a record without a fault; a picture's header is read only where its size decides its rows.

    Raises:
        ValueError: the template refuses the conversation, or see `Pictures.open_file`.
        OSError: a picture cannot be opened.
    """
    ids, learnt = processor.tokenize_conversation(record["messages"])
    is_picture = ids == processor.image_token_id
    widths = np.ones(len(ids), dtype=np.int64)
    widths[is_picture] = [_picture_rows(image, pictures, processor) for image in record["images"]]
    ends = widths.cumsum()
    learnt[0] = False  # no row predicts the first token
    cut = ends > max_length
    return Measure(
        rows=int(ends[-1]),
        learnt=int(learnt.sum()),
        lost=max(0, int(ends[-1]) - max_length),
        lost_learnt=int((learnt & cut).sum()),
        cuts_image=bool((is_picture & cut).any()),
    )


def _picture_rows(image: Any, pictures: Pictures, processor: LlavaSkipProcessor) -> int:
    if not processor.length_depends_on_size:
        return processor.image_length(1, 1)
    with pictures.open_file(image) as picture:
        return processor.image_length(*upright_size(picture))
