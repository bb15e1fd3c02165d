"""Which rows of an engine's batch are whose: pure functions, which need no engine.

An engine has the tokens of all its sequences as rows of one matrix. A model that forgets gives it only the rows that
are kept; the skipped rows of an image come along as further channels of its kept ones, and are put among them for the
time of one forward.

Shapes: N images, L tokens of a block, K of them kept and S skipped, D width; T rows of the engine (of all sequences), R
sequences, E = T + N * S rows with the skipped ones among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llava_skip.configuration import SkipConfig


@dataclass(frozen=True)
class Block:
    """The places in a block of the tokens that are kept [K] and skipped [S], each in the order of the block.

    Attributes:
        kept: places of the kept ones.
        skipped: places of the skipped ones.
        text_sees: whether text of the prompt attends to the skipped ones.
    """

    kept: tuple[int, ...]
    skipped: tuple[int, ...]
    text_sees: bool = True

    @classmethod
    def of(cls, skip: SkipConfig) -> Block:
        """Of the method."""
        places = range(skip.length)
        kept, skipped = (tuple(p for p in places if skip.skipping[p] == own) for own in (False, True))
        return cls(kept, skipped, skip.text_sees_skipped)

    @property
    def length(self) -> int:
        """L."""
        return len(self.kept) + len(self.skipped)

    @property
    def carried(self) -> int:
        """How many skipped rows each kept one carries, at most."""
        return -(-len(self.skipped) // len(self.kept))

    @property
    def growth(self) -> int:
        """The least whole number of times that positions can be more than rows."""
        return -(-self.length // len(self.kept))

    @cached_property
    def gaps(self) -> Tensor:
        """[K + 1], for each kept token, and for what follows the block, the skipped ones before it."""
        places = torch.tensor([*self.kept, self.length])
        return places - torch.arange(len(places))


# --- what an image's rows carry


def pack(blocks: Tensor, block: Block) -> Tensor:
    """Blocks [N, L, D] -> the kept rows with the skipped ones as further channels [N, K, (1 + carried) * D]."""
    images, _, width = blocks.shape
    room = blocks.new_zeros(images, len(block.kept) * block.carried, width)
    room[:, : len(block.skipped)] = blocks[:, block.skipped]
    return torch.cat([blocks[:, block.kept], room.view(images, len(block.kept), -1)], dim=-1)


def unpack(rows: Tensor, block: Block, width: int) -> tuple[Tensor, Tensor]:
    """Rows of whole images [N * K, (1 + carried) * D] -> kept [N * K, D] and skipped [N * S, D]."""
    kept, carried = rows.tensor_split([width], dim=-1)
    room = carried.reshape(-1, len(block.kept) * block.carried, width)
    return kept, room[:, : len(block.skipped)].reshape(-1, width)


def mark(blocks: Tensor, skip: SkipConfig) -> Tensor:
    """Blocks [N, L, D] -> [N, L, D + 1]; the last channel is 1 for a row that skips."""
    marks = blocks.new_tensor(skip.skipping)[None, :, None]
    return torch.cat([blocks, marks.expand(len(blocks), -1, -1)], dim=-1)


# --- positions


def positions(length: int, starts: list[int], prompt: int, block: Block) -> tuple[Tensor, int]:
    """Positions of a sequence's rows in the whole sequence, and which of them are the prompt's.

    Args:
        length: number of rows; more than `prompt` where generated ones come along.
        starts: the first row of each image.
        prompt: number of rows of the prompt.
        block: of each image.

    Returns:
        [3, length]: the positions, then twice minus the prompt's number of rows for its own rows and the positions for
        others; and what is added to a row's number for the rows after these.
    """
    jumps = torch.zeros(length + 1, dtype=torch.long)
    for start in starts:
        jumps[start : start + len(block.gaps)] += torch.diff(block.gaps, prepend=block.gaps.new_zeros(1))
    place = torch.arange(length) + jumps.cumsum(0)[:length]
    marks = place.where(torch.arange(length) >= prompt, -prompt)
    return torch.stack([place, marks, marks]), len(starts) * len(block.skipped)


def check_whole(marks: Tensor, starts: Tensor) -> Tensor:
    """The sequences whose prompt is in this forward in part.

    Args:
        marks: [T], minus the number of the prompt's rows for rows of a prompt with images, else 0 or more.
        starts: [R + 1], the first row of each sequence, and the end of the last one.

    Returns:
        The numbers of the sequences.
    """
    before = torch.nn.functional.pad((marks < 0).cumsum(0), (1, 0))
    counted = before[starts[1:]] - before[starts[:-1]]
    said = -marks[starts[:-1].clamp(max=len(marks) - 1)].clamp(max=0)
    return ((counted != said) & (starts[1:] > starts[:-1])).nonzero().flatten()


# --- one forward


@dataclass(frozen=True)
class Expanded:
    """The rows of a forward with the skipped ones among them.

    Attributes:
        order: [E], indices into the T rows followed by the N * S skipped ones.
        kept: [T], where each of the T rows is.
        positions: [E].
        sequences: of each sequence with images its first row, its end, and who of it sees whom [rows, rows]; None where
            each row sees all before it.
    """

    order: Tensor
    kept: Tensor
    positions: Tensor
    sequences: list[tuple[int, int, Tensor | None]]


def expand(place: Tensor, marks: Tensor, is_image: Tensor, starts: Tensor, block: Block) -> Expanded:
    """Put skipped rows among the T rows of a forward in which every prompt with images is whole.

    Args:
        place: [T], positions; what is behind the last sequence is padding.
        marks: [T], as for `check_whole`.
        is_image: [T] bool, rows of images.
        starts: [R + 1], as for `check_whole`.
        block: of each image.
    """
    device, kept, skipped = place.device, len(block.kept), len(block.skipped)
    sequence = torch.bucketize(torch.arange(len(place), device=device), starts[1:], right=True)
    first = is_image.nonzero().view(-1, kept)[:, 0]  # of each image
    images = torch.arange(1, len(first) + 1, device=device)
    begin = place[first] - block.kept[0]
    added = (begin[:, None] + torch.tensor(block.skipped, device=device)).flatten()
    place, sequence = torch.cat([place, added]), torch.cat([sequence, sequence[first].repeat_interleave(skipped)])
    # By sequence, then by position: a stable sort by the one after a sort by the other.
    order = place.argsort(stable=True)
    order = order[sequence[order].argsort(stable=True)]
    where = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
    viewer = torch.zeros_like(place)  # the number of the image that a row is of, 0 for others
    viewer[: len(is_image)][is_image] = images.repeat_interleave(kept)
    viewer[len(is_image) :] = images.repeat_interleave(skipped)
    owner = viewer.clone()  # of skipped rows alone
    owner[: len(is_image)] = 0
    generated = torch.nn.functional.pad(marks >= 0, (0, len(added)))
    spans = _spans(sequence[order], sequence[first])
    rows = [order[start:end] for start, end in spans]
    masks = [_sees(viewer[own], owner[own], generated[own], block.text_sees) for own in rows]
    sequences = [(start, end, mask) for (start, end), mask in zip(spans, masks, strict=True)]
    return Expanded(order, where[: len(is_image)], place[order], sequences)


def _spans(sequence: Tensor, wanted: Tensor) -> list[tuple[int, int]]:
    """The first row and the end of each of the wanted sequences, in rows that are sorted by sequence."""
    wanted = wanted.unique()
    ends = torch.stack([torch.searchsorted(sequence, wanted), torch.searchsorted(sequence, wanted, right=True)], dim=1)
    return [(start, end) for start, end in ends.tolist()]


def _sees(viewer: Tensor, owner: Tensor, generated: Tensor, text_sees: bool) -> Tensor | None:
    """Who sees whom [rows, rows] among the rows of a sequence; None if each one sees all before it."""
    if text_sees and not generated.any():
        return None
    allowed = ~generated[:, None] if text_sees else owner[None] == viewer[:, None]
    return ((owner[None] == 0) | allowed).tril()
