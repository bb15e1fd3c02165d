"""How long the samples of a data set are: measured from a file, or assumed; and what goes through a model with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.flops import head_widths, image_rows
from llava_skip.processing import LlavaSkipProcessor
from llava_skip.step_flops import Load
from llava_skip_base.errors import UserError
from train.data import RecordSet
from train.data.measure import measure
from train.data.parallel import map_rows


@dataclass(frozen=True)
class Shape:
    """The samples of a data set without their images' tokens, which a preset decides.

    Attributes:
        weights: [K] samples of each kind; measured ones are a kind each.
        text: [K] tokens of text.
        supervised: [K] of them, with a label.
        images: [K] images.
        source: where the numbers come from, in words.
    """

    weights: np.ndarray
    text: np.ndarray
    supervised: np.ndarray
    images: np.ndarray
    source: str

    @property
    def samples(self) -> float:
        """Their number."""
        return float(self.weights.sum())

    def described(self) -> dict[str, Any]:
        """The means, as plain data."""
        means = {
            name: float((self.weights * getattr(self, name)).sum() / self.samples)
            for name in ("text", "supervised", "images")
        }
        return {"source": self.source, "samples": round(self.samples)} | {f"mean_{k}": v for k, v in means.items()}

    def load(self, config: LlavaSkipConfig, max_length: int) -> Load:
        """What one epoch brings to a model, without padding; text beyond `max_length` is cut, as training does."""
        layers, text = image_rows(config), config.text_config
        asks, asked = (np.mean([getattr(rows, name) for rows in layers]) for name in ("queries", "keys"))
        ffn = np.mean([rows.ffn for rows in layers[:-1] or layers])
        both = np.mean([rows.queries * rows.keys for rows in layers])
        left = np.maximum(0, max_length - self.images * config.image_seq_length)
        words = np.minimum(self.text, left)
        supervised = self.supervised * words / np.maximum(self.text, 1)
        queries, keys = head_widths(text)
        mean = (asks * queries + asked * keys) / (queries + keys)
        pairs = words**2 + words * self.images * (asks + asked) + self.images**2 * both

        def total(values: np.ndarray) -> float:
            return float((self.weights * values).sum())

        return Load(
            samples=self.samples,
            images=total(self.images),
            crops=total(self.images) * config.most_crops,
            tokens=total(words + self.images * mean),
            pairs=total(pairs),
            ffn_tokens=total(words + self.images * ffn),
            head_tokens=total(supervised),
        )


def assumed(samples: float, text: float, supervised: float, image_share: float, images: float = 1) -> Shape:
    """A set of which only means are known: all samples are equally long, and a share of them has images.

    Raises:
        UserError: numbers that no data set has.
    """
    for name, value, most in (
        ("samples", samples, 1e13), ("text_tokens", text, 1e7), ("supervised_tokens", supervised, text),
        ("image_share", image_share, 1), ("images_a_sample", images, 1e4),
    ):  # fmt: skip
        if not 0 <= value <= most or (name == "samples" and value < 1):
            raise UserError(f"--{name} is {value:g}; it must be from {'1' if name == 'samples' else '0'} to {most:g}.")
    kinds = np.array([samples * image_share, samples * (1 - image_share)])
    source = f"assumed: {text:g} tokens of text, {supervised:g} of them supervised, in each sample"
    return Shape(kinds, np.full(2, text), np.full(2, supervised), np.array([images, 0.0]), source)


@dataclass(frozen=True)
class _Lengths:
    """Tokens of text, supervised tokens and images of the record at a row."""

    records: RecordSet
    processor: LlavaSkipProcessor

    def __call__(self, row: int) -> tuple[int, int, int]:
        record = self.records.record(row)
        images = len(record["images"])
        sizes = self.processor.image_length(1, 1)
        found = measure(record, self.records.images_of(row), self.processor, max_length=2**40)
        return found.length - images * sizes, found.supervised, images


def measured(records: RecordSet, processor: LlavaSkipProcessor, processes: int, most: int, source: str) -> Shape:
    """The shape of a set by training's own measuring; of a larger one, `most` records spread evenly over it.

    Args:
        records: the set.
        processor: of a front end whose images are all equally long.
        processes: that measure.
        most: records that are measured.
        source: the set's name.

    Raises:
        RecordError: a record cannot be measured.
    """
    rows = records.used_rows
    if not len(rows):
        raise UserError(f"{source} has no records: give another set.")
    chosen = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(np.int64)]
    found = list(map_rows(_Lengths(records, processor), chosen, processes, "measuring samples"))
    text, supervised, images = np.array(found, dtype=np.float64).T
    words = f"measured: {source}" + (
        f", {len(chosen):,} of its {len(rows):,} records" if len(chosen) < len(rows) else ""
    )
    return Shape(np.full(len(chosen), len(records) / len(chosen)), text, supervised, images, words)
