"""Scenes: up to four handwritten digits in a 2x2 grid, drawn from scikit-learn's copy of the UCI optical digits."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from functools import cache
from random import Random

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CELLS = ("top left", "top right", "bottom left", "bottom right")
CELL_SIZE = 24
DIGIT_SIZE = 20
# About the mean of CLIP's pixel normalisation: an empty patch is then near zero, and the strokes are what a tower sees.
BACKGROUND = 114
EVAL_SHARE = 0.25
# How often an image has 1, 2, 3 or 4 digits: mostly 4, but the count cannot be guessed.
COUNT_WEIGHTS = (1, 1, 2, 4)

# The indices into load_digits() of one part's handwritten samples, by the digit they show.
Pool = dict[int, list[int]]


@dataclass(frozen=True)
class Pose:
    """How a handwritten sample is drawn in its cell: turned, stretched and slanted about its middle, then moved.

    `angle` in radians, `stretch` and `slant` as factors, `shift` in pixels.
    """

    angle: float = 0.0
    stretch: tuple[float, float] = (1.0, 1.0)
    slant: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)

    def place(self, cell: Image.Image) -> Image.Image:
        """The cell with its digit in this pose."""
        if self == UPRIGHT:
            return cell
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        turn = np.array([[cos, -sin], [sin, cos]]) @ np.array([[self.stretch[0], self.slant], [0.0, self.stretch[1]]])
        middle = np.full(2, CELL_SIZE / 2)
        offset = middle - turn @ (middle + np.array(self.shift))
        # Pillow takes the inverse: where in the old cell each pixel of the new one comes from.
        inverse = (*turn[0], offset[0], *turn[1], offset[1])
        return cell.transform(
            cell.size, Image.Transform.AFFINE, inverse, resample=Image.Resampling.BICUBIC, fillcolor=BACKGROUND
        )


UPRIGHT = Pose()


@dataclass(frozen=True)
class Scene:
    """An image before it is drawn: for each cell the index of its handwritten sample, or None; and the poses."""

    samples: tuple[int | None, ...]
    poses: tuple[Pose, ...] = (UPRIGHT,) * len(CELLS)

    @property
    def digits(self) -> dict[str, int]:
        """The digit in each cell that is not empty, in reading order."""
        labels = load_digits_once()[1]
        return {cell: int(labels[i]) for cell, i in zip(CELLS, self.samples, strict=True) if i is not None}

    def draw(self) -> Image.Image:
        """The image: white digits on gray, 48x48, 8-bit."""
        image = Image.new("L", (2 * CELL_SIZE, 2 * CELL_SIZE), BACKGROUND)
        for cell, (sample, pose) in enumerate(zip(self.samples, self.poses, strict=True)):
            if sample is not None:
                image.paste(pose.place(cell_image(sample)), (cell % 2 * CELL_SIZE, cell // 2 * CELL_SIZE))
        return image

    def png(self) -> bytes:
        """The image as the bytes of a PNG file."""
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
    """A cell with one handwritten sample in its middle."""
    ink = load_digits_once()[0][sample] / 16
    values = np.rint(BACKGROUND + ink * (255 - BACKGROUND)).astype(np.uint8)
    digit = Image.fromarray(values).resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC)
    cell = Image.new("L", (CELL_SIZE, CELL_SIZE), BACKGROUND)
    cell.paste(digit, ((CELL_SIZE - DIGIT_SIZE) // 2,) * 2)
    return cell


@cache
def digit_pools() -> tuple[Pool, Pool]:
    """The handwritten samples for training and, disjoint from them, for evaluation.

    The split does not depend on the seed of a build, so no build has the evaluation digits of another one in its
    training images.
    """
    labels = load_digits_once()[1]
    parts = train_test_split(np.arange(len(labels)), test_size=EVAL_SHARE, stratify=labels, random_state=0)
    train, evaluation = ({d: sorted(part[labels[part] == d].tolist()) for d in range(10)} for part in parts)
    return train, evaluation


def random_scene(pool: Pool, rng: Random) -> Scene:
    """A scene of one to four digits, each digit and each cell equally likely."""
    count = rng.choices(range(1, 5), weights=COUNT_WEIGHTS)[0]
    filled = rng.sample(range(4), count)
    return Scene(tuple(rng.choice(pool[rng.randrange(10)]) if cell in filled else None for cell in range(4)))


def varied(scene: Scene, rng: Random, strength: float = 1.0) -> Scene:
    """The scene with a random pose for every digit, `strength` times as far from upright as by default.

    1347 samples are few: without this a model memorises them and reads held-out handwriting worse.
    """
    return replace(scene, poses=tuple(_random_pose(rng, strength) for _ in CELLS))


def _random_pose(rng: Random, strength: float) -> Pose:
    def around(middle: float, most: float) -> float:
        return rng.uniform(middle - strength * most, middle + strength * most)

    return Pose(
        angle=around(0, math.radians(7)),
        stretch=(around(1, 0.07), around(1, 0.07)),
        slant=around(0, 0.09),
        shift=(around(0, 0.9), around(0, 0.9)),
    )
