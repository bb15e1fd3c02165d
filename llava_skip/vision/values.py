"""Pixels as bytes -> the values that a vision tower takes, by a table of 256 numbers for each colour.

A byte has one value, whichever pixel it is of: the table is rescaled and normalised, and pixels are looked up in it.
The host and every device then give the same values, to the last digit. Shapes: N images, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

AS_BYTES = {"do_rescale": False, "do_normalize": False}
"""Arguments of a call of an image processor that leave pixels as bytes."""


def every_byte() -> np.ndarray:
    """[3, 1, 256] uint8: an image that has each byte once in each colour."""
    return np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))


def look_up(table: np.ndarray, crops: Sequence[np.ndarray]) -> np.ndarray:
    """Values of N crops of one size.

    Args:
        table: [3, 256], for each colour the value of each byte.
        crops: each [height, width, 3] uint8.

    Returns:
        [N, 3, height, width] of the table's type; with a table of bytes the pixels as they are.
    """
    values = np.empty((len(crops), 3, *crops[0].shape[:2]), dtype=table.dtype)
    for pixels, own in zip(crops, values, strict=True):
        if table.dtype == np.uint8:
            own[:] = pixels.transpose(2, 0, 1)
            continue
        for colour in range(3):
            np.take(table[colour], pixels[:, :, colour], out=own[colour], mode="clip")  # a byte is never outside
    return values


class PixelValues:
    """Looks pixels up where they are: the loader brings bytes, a quarter of the values' size, and the device the rest.

    Args:
        table: [3, 256] float32, `value_table` of an image processor.
    """

    def __init__(self, table: np.ndarray) -> None:
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._table = torch.from_numpy(np.ascontiguousarray(table)).flatten()

    @classmethod
    def of(cls, processor: Any) -> PixelValues | None:
        """Of a processor's image processor; None if it has no `value_table`, or leaves pixels as bytes by itself."""
        make = getattr(getattr(processor, "image_processor", None), "value_table", None)
        table = None if make is None else make()
        return None if table is None or table.dtype == np.uint8 else cls(table)

    def __call__(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, 3, S, S] uint8 -> values of a number format on the same device; what is no byte stays as it is."""
        if pixels.dtype != torch.uint8:
            return pixels
        table = self._tables.get((pixels.device, dtype))
        if table is None:
            table = self._tables[pixels.device, dtype] = self._table.to(pixels.device, dtype)
        first = torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=pixels.device)[:, None, None]
        return table.index_select(0, (pixels.int() + first).flatten()).view(pixels.shape)
