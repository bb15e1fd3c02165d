"""Which rows of a batch take the FFN and which ones the cache keeps: pure functions on tensors.

Shapes: B batch, T new rows of a sample, W its rows so far, D width, M rows that take the FFN, K rows that the
cache keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from llava_skip.configuration import SkipConfig


@dataclass(frozen=True)
class Pictures:
    """Where the placeholders of pictures are.

    Attributes:
        is_image: [B, W] bool, over all rows so far, the new ones last; over the new ones alone if these hold whole
            pictures.
        new: T.
        prompt: rows behind so many of the W are generated.
    """

    is_image: Tensor
    new: int
    prompt: int

    @classmethod
    def among(cls, is_image: Tensor, prompt_images: Tensor | None = None, seen: int = 0) -> Pictures:
        """Those of a forward.

        Args:
            is_image: [B, T] bool, the image tokens among the new rows.
            prompt_images: [B, P] bool, the placeholders of a whole prompt from the first row of the sequence on: image
                tokens behind it are text that was generated. None: the new rows are prompt, and hold whole pictures.
            seen: rows in front of the new ones.
        """
        new = is_image.shape[1]
        if prompt_images is None:
            return cls(is_image, new, new)
        total, prompt = seen + new, prompt_images.shape[1]
        return cls(nn.functional.pad(prompt_images[:, :total], (0, max(0, total - prompt))), new, prompt)

    @property
    def in_new(self) -> Tensor:
        """[B, T] bool, the placeholders among the new rows."""
        return self.is_image[:, -self.new :]


@dataclass(frozen=True)
class Route:
    """What happens to each row of one forward, computed once and used by every layer.

    Attributes:
        ffn_rows: [M] flat indices into [B * T] of the rows that take the FFN; None if all do.
        kept: [B, T] True where the cache keeps the row's keys and values; None if it keeps all.
        real: [B, T] False on padding; None if nothing is padded.
        layers: the layers that the route is for; None: all. The others run all rows.
    """

    ffn_rows: Tensor | None = None
    kept: Tensor | None = None
    real: Tensor | None = None
    layers: tuple[int, ...] | None = None

    def rows_in(self, layer: int) -> Tensor | None:
        """`ffn_rows` in this layer; None if all rows take its FFN."""
        return self.ffn_rows if self.layers is None or layer in self.layers else None


def skipped_rows(is_image: Tensor, skip: SkipConfig) -> Tensor:
    """True where a row is a skipped visual token.

    Every picture takes `skip.length` placeholders, so a placeholder's place in its picture is its count in the
    sample modulo that number: any offset, any number of pictures a sample, adjacent pictures included.

    Args:
        is_image: [B, W] bool, the placeholders, from the first one of a picture on.
        skip: the sizes of a picture's block.

    Returns:
        [B, W] bool.
    """
    place = (is_image.cumsum(dim=1) - 1) % skip.length
    return is_image & _skipping(skip, is_image.device)[place]


@lru_cache(maxsize=32)
def _skipping(skip: SkipConfig, device: torch.device) -> Tensor:
    """`skip.skipping` as a tensor on the device: copied there once, not in every forward."""
    return torch.tensor(skip.skipping, device=device)


def hidden_from(is_image: Tensor, skip: SkipConfig) -> tuple[Tensor, Tensor]:
    """Which rows may not see skipped rows: those behind a picture, of that picture's.

    Args:
        is_image: [B, W] bool, the placeholders, from the first one of a picture on.
        skip: the sizes of a picture's block.

    Returns:
        viewer [B, W], the number of the picture that a row belongs to, 0 for text; and owner [B, W], the number of the
        picture whose skipped row this is, 0 for every other row. Row i may see row j unless owner[j] is neither 0 nor
        viewer[i].
    """
    number = torch.where(is_image, (is_image.cumsum(dim=1) - 1) // skip.length + 1, 0)
    return number, torch.where(skipped_rows(is_image, skip), number, 0)


def make_route(pictures: Pictures, real: Tensor | None, skip: SkipConfig | None) -> Route:
    """The route of a forward over pictures and text (a prefill or a piece of one, or a training step).

    Args:
        pictures: where the placeholders are.
        real: [B, T] bool, False on padding; None if nothing is padded.
        skip: None for a dense model, whose padding still costs no FFN.
    """
    ffn = real
    if skip is not None:
        skipped = skipped_rows(pictures.is_image, skip)[:, -pictures.new :]
        ffn = ~skipped if real is None else real & ~skipped
    if ffn is None:
        return Route()
    rows = ffn.flatten().nonzero().squeeze(1)
    if rows.numel() == ffn.numel():
        return Route(real=real)
    kept = ffn if skip is not None and skip.forget_cache else None
    return Route(ffn_rows=rows, kept=kept, real=real, layers=skip.layers if skip else None)


def take_rows(hidden_states: Tensor, rows: Tensor) -> Tensor:
    """Gather rows: [B, T, D] and flat indices [M] -> [M, D]."""
    return hidden_states.flatten(0, 1).index_select(0, rows)


def add_rows(hidden_states: Tensor, rows: Tensor, update: Tensor) -> Tensor:
    """Put back: [B, T, D] with `update` [M, D] added at the flat indices `rows` [M]; the other rows unchanged."""
    flat = hidden_states.flatten(0, 1)
    return flat.index_add(0, rows, update.to(flat.dtype)).view_as(hidden_states)


def align_right(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Where the kept rows of each sample come from when they are packed to the right end.

    Args:
        kept: [B, T] bool.

    Returns:
        index [B, K] into T, in order, K the largest number that a sample keeps; and valid [B, K], False on the rows
        in front of a sample that keeps fewer.
    """
    longest = int(kept.sum(dim=1).max())
    order = kept.to(torch.uint8).argsort(dim=1, stable=True)
    index = order[:, order.shape[1] - longest :]
    return index, kept.gather(1, index)
