"""Scenes: up to four handwritten digits in a 2x2 grid, drawn from scikit-learn's copy of the UCI optical digits."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CELLS = ("top left", "top right", "bottom left", "bottom right")
CELL_SIZE = 32
DIGIT_SIZE = 16
EVAL_SHARE = 0.25
# How often a picture holds 1, 2, 3 or 4 digits: mostly full, yet counting cannot be guessed.
COUNT_WEIGHTS = (1, 1, 2, 4)

# The indices into load_digits() of one part's handwritten samples, by the digit they show.
Pool = dict[int, list[int]]


@dataclass(frozen=True)
class Scene:
    """One picture before it is drawn: for each cell the index of its handwritten sample, or None."""

    samples: tuple[int | None, ...]

    @property
    def digits(self) -> dict[str, int]:
        """The digit in each cell that is not empty, in reading order."""
        labels = load_digits_once()[1]
        return {cell: int(labels[i]) for cell, i in zip(CELLS, self.samples, strict=True) if i is not None}

    def draw(self) -> Image.Image:
        """The picture: white digits on black, 64x64, 8-bit gray."""
        picture = Image.new("L", (2 * CELL_SIZE, 2 * CELL_SIZE))
        for place, sample in enumerate(self.samples):
            if sample is not None:
                picture.paste(cell_image(sample), (place % 2 * CELL_SIZE, place // 2 * CELL_SIZE))
        return picture

    def png(self) -> bytes:
        """The picture as the bytes of a PNG file."""
        buffer = io.BytesIO()
        self.draw().save(buffer, format="PNG")
        return buffer.getvalue()


@cache
def load_digits_once() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 samples [1797, 8, 8] with values 0..16, and their labels [1797]."""
    bunch = load_digits()
    return bunch.images, bunch.target


@cache
def cell_image(sample: int) -> Image.Image:
    """A cell with one handwritten sample in its middle; most of a picture is background, as in photographs."""
    values = np.rint(load_digits_once()[0][sample] * (255 / 16)).astype(np.uint8)
    digit = Image.fromarray(values).resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC)
    cell = Image.new("L", (CELL_SIZE, CELL_SIZE))
    cell.paste(digit, ((CELL_SIZE - DIGIT_SIZE) // 2,) * 2)
    return cell


@cache
def digit_pools() -> tuple[Pool, Pool]:
    """The handwritten samples for training and, disjoint from them, for evaluation.

    The split does not depend on the seed of a build, so no model ever meets evaluation digits in another build's
    training pictures.
    """
    labels = load_digits_once()[1]
    parts = train_test_split(np.arange(len(labels)), test_size=EVAL_SHARE, stratify=labels, random_state=0)
    train, evaluation = ({d: sorted(part[labels[part] == d].tolist()) for d in range(10)} for part in parts)
    return train, evaluation


def random_scene(pool: Pool, rng: Random) -> Scene:
    """A scene of one to four digits, each digit and each cell equally likely."""
    count = rng.choices(range(1, 5), weights=COUNT_WEIGHTS)[0]
    filled = rng.sample(range(4), count)
    return Scene(tuple(rng.choice(pool[rng.randrange(10)]) if place in filled else None for place in range(4)))
