"""What the models of an analysis answer, and what they make of the images, side by side."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval.answering.generate import Generator
from eval.study.analysis.loading import Analysed
from eval.study.analysis.questions import Encoded, Question
from llava_skip.pictures import ImageParts, draw_panels, image_parts
from llava_skip_base.files import write_bytes

ANSWER_TOKENS = 32
"""Limit of an answer's length."""
PICTURES = "pictures"


@dataclass(frozen=True)
class Seen:
    """What a model makes of the images of a question: for each its crops [crops, 3, side, side] and their parts."""

    images: list[tuple[Tensor, ImageParts]]


def answers_of(analysed: Analysed, questions: Sequence[Question], batch_size: int) -> list[str]:
    """The model's answers, greedily."""
    generator = Generator.of_loaded(analysed.saved.folder, analysed.model, analysed.processor)
    found: list[str] = []
    bar = {"desc": f"answers of {analysed.saved.name}", "disable": None, "leave": False}
    for start in tqdm(range(0, len(questions), batch_size), unit="batch", **bar):
        some = questions[start : start + batch_size]
        found += generator.answer([q.prompt for q in some], [q.images for q in some], ANSWER_TOKENS)
    return found


@torch.no_grad()
def seen_by(analysed: Analysed, samples: Iterable[Encoded]) -> list[Seen]:
    """What the model makes of the images of each sample."""
    parameter = next(analysed.model.parameters())
    found = []
    for sample in samples:
        pixels, counts = sample.pixel_values, sample.crop_counts
        if pixels is None:
            found.append(Seen([]))
            continue
        split = pixels.split([1] * len(pixels) if counts is None else counts.tolist())
        on_device = [crops.to(parameter.device, parameter.dtype) for crops in split]
        parts = [image_parts(analysed.model.model, crops) for crops in on_device]
        found.append(Seen(list(zip(split, parts, strict=True))))
    return found


def chosen(answers: Sequence[Sequence[str]], count: int) -> list[int]:
    """Indices of the samples to show: those whose answers differ first, then others; both spread evenly, in order.

    Args:
        answers: of each model.
        count: the most samples.
    """
    differ = [n for n, texts in enumerate(zip(*answers, strict=True)) if flipped(texts)]
    same = sorted(set(range(len(answers[0]))) - set(differ))
    first = _spread(differ, count)
    return first + _spread(same, count - len(first))


def flipped(texts: Sequence[str]) -> bool:
    """Whether the answers of the models differ, but for capitals and white space."""
    return len({" ".join(text.casefold().split()) for text in texts}) > 1


def _spread(places: Sequence[int], count: int) -> list[int]:
    if count >= len(places):
        return list(places)
    return [places[number * len(places) // count] for number in range(count)]


def draw_seen(seen: Seen, image_processor: Any, folder: Path, name: str) -> list[dict[str, str]]:
    """Draw a question's images; file names relative to the page, with captions.

    Args:
        seen: what the model makes of them.
        image_processor: whose mean and scale the crops have.
        folder: of the page.
        name: of the files, without an ending.
    """
    files = []
    for number, (crops, parts) in enumerate(seen.images):
        for panel in draw_panels(crops, parts, image_processor):
            file = f"{PICTURES}/{name}-{number}-{panel.kind}.png"
            buffer = io.BytesIO()
            panel.picture.save(buffer, "PNG")
            write_bytes(folder / file, buffer.getvalue())
            files.append({"file": file, "caption": panel.caption})
    return files
