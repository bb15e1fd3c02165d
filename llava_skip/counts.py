"""How many tokens of each kind a forward has: all that the host must know of ids, mask and labels, read at once.

The tokens themselves stay on the device. But the host must know how many a gather takes, and whether there is padding
at all. Each such question, asked where it comes up, has the host wait until the device has done all its work. So they
are asked together, before the vision tower runs, or answered where a batch is made and handed to the forward.

Shapes: B batch, T new tokens of a sample, W its tokens so far, N images.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llava_skip.configuration import IGNORE_INDEX, LlavaSkipConfig
from llava_skip.routing import ImageTokens
from llava_skip_base.errors import UserError


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of tokens of a forward.

    Attributes:
        shape: B and T, by which counts of another batch are told from these.
        image: new tokens that must be image tokens.
        found: new tokens that are image tokens.
        wrong: new tokens that are one of both, generated ones left out.
        cut: image tokens in samples that lack a part of an image.
        real: new tokens that are no padding.
        padding: zeros in the mask, that of earlier tokens included.
        ffn: new tokens that take the FFN, M.
        longest: the most of these in one sample; as many tokens of each sample does a cache that forgets store.
        hidden: skipped tokens among the latest ones, which some tokens may not see.
        supervised: tokens whose next one has a label; None where there were no labels to count.
        first: the first column [0, T) that has one of these; 0 if there is none.
        crops: crops of each image; empty where an image has no `crop_counts`.
        sequences: tokens of each of the samples that lie one after the other in one row; empty: it is not known.
    """

    shape: tuple[int, int]
    image: int
    found: int
    wrong: int
    cut: int
    real: int
    padding: int
    ffn: int
    longest: int
    hidden: int
    supervised: int | None
    first: int
    crops: tuple[int, ...] = ()
    sequences: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """B * T."""
        return self.shape[0] * self.shape[1]

    def repeated(self, times: int) -> TokenCounts:
        """Those of a batch in which each sample comes `times` times."""
        totals = ("image", "found", "wrong", "cut", "real", "padding", "ffn", "hidden", "supervised")
        scaled = {name: value * times for name in totals if (value := getattr(self, name)) is not None}
        return replace(self, shape=(self.shape[0] * times, self.shape[1]), **scaled)


def count_tokens(
    images: ImageTokens,
    found: Tensor,
    mask: Tensor | None = None,
    supervised: Tensor | None = None,
    crop_counts: Tensor | None = None,
    latest: int = 0,
) -> TokenCounts:
    """Count the tokens of a forward; reads the device once.

    Args:
        images: where image tokens must be.
        found: [B, T] bool, where they are.
        mask: [B, at least T], 0 on padding; None if nothing is padded.
        supervised: [B, T] bool, the tokens whose next one has a label; None without labels.
        crop_counts: [N]; None if the images have none.
        latest: number of tokens at the end that `TokenCounts.hidden` is about; 0: all W.
    """
    is_image, skipped = images.in_new, images.skipped
    real = torch.ones_like(is_image) if mask is None else real_tokens(mask, images.new)
    ffn = real if images.skipped_in_new is None else real & ~images.skipped_in_new
    size = 1 if images.skip is None else images.skip.length
    none = is_image.new_zeros((), dtype=torch.long)
    numbers = {
        "image": is_image.sum(),
        "found": found.sum(),
        "wrong": (is_image != found)[:, : images.new - images.generated].sum(),
        "cut": (is_image.sum(dim=1) % size).sum(),
        "real": real.sum(),
        "padding": none if mask is None else (mask == 0).sum(),
        "ffn": ffn.sum(),
        "longest": ffn.sum(dim=1).max(),
        "hidden": none if skipped is None else skipped[:, -latest:].sum(),
        "supervised": none if supervised is None else supervised.sum(),
        "first": none if supervised is None else supervised.any(dim=0).to(torch.uint8).argmax(),
    }
    read = torch.stack([number.to(is_image.device) for number in numbers.values()])
    if crop_counts is not None:
        read = torch.cat([read, crop_counts.to(read)])
    values = read.tolist()
    counts: dict[str, Any] = dict(zip(numbers, values, strict=False))
    if supervised is None:
        counts["supervised"] = None
    return TokenCounts((found.shape[0], images.new), **counts, crops=tuple(values[len(numbers) :]))


def count_batch(config: LlavaSkipConfig, batch: dict[str, Any]) -> TokenCounts:
    """The argument `counts` of a training step, where its batch is made: a forward that has it reads nothing.

    They hold for this batch alone: its ids, mask and labels.

    Args:
        config: of the model.
        batch: arguments of the model: `input_ids` [B, T], and `attention_mask`, `labels`, `shift_labels`,
            `crop_counts` and `position_ids` (of several samples in one row) if any.
    """
    found = batch["input_ids"] == config.image_token_id
    images = ImageTokens.of_forward(found, config.skip_config)
    supervised = supervised_tokens(batch.get("labels"), batch.get("shift_labels"))
    counts = count_tokens(images, found, batch.get("attention_mask"), supervised, batch.get("crop_counts"))
    positions = batch.get("position_ids")
    return counts if positions is None else replace(counts, sequences=lengths_in_row(positions))


def lengths_in_row(position_ids: Tensor) -> tuple[int, ...]:
    """Tokens of each sample of a row, by its positions [1, T], which start again with each; reads their device."""
    starts = (position_ids[0].diff() != 1).nonzero().squeeze(1) + 1
    bounds = [0, *starts.tolist(), position_ids.shape[1]]
    return tuple(end - begin for begin, end in itertools.pairwise(bounds))


def with_counts(
    images: ImageTokens,
    counts: TokenCounts | None,
    found: Tensor,
    mask: Any = None,
    supervised: Tensor | None = None,
    crop_counts: Tensor | None = None,
    latest: int = 0,
) -> ImageTokens:
    """The image tokens of a forward with their counts; arguments as those of `count_tokens`.

    Given counts are taken, unless they are of a batch of another shape, as after prompt tuning, or had no labels that
    there are now; that they are of these ids and labels is not looked at. Without them the device is read once. A mask
    that is not two-dimensional has no padding that could be counted.
    """
    if torch.compiler.is_exporting():  # a graph cannot depend on values
        return images
    counted = counts is not None and counts.shape == tuple(found.shape)
    if counts is None or not counted or (supervised is not None and counts.supervised is None):
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        counts = count_tokens(images, found, mask, supervised, crop_counts, latest)
    return replace(images, counts=counts)


def num_supervised(images: ImageTokens | None) -> int | None:
    """Number of tokens of a forward whose next one has a label; None if it was not counted."""
    return None if images is None or images.counts is None else images.counts.supervised


def supervised_tokens(labels: Tensor | None, targets: Tensor | None = None) -> Tensor | None:
    """[B, T] bool, the tokens whose next one has a label; None without labels.

    Args:
        labels: [B, T], -100 where there is none.
        targets: [B, T], the labels of each token's next one; they go before `labels`.
    """
    targets = next_labels(labels) if targets is None else targets
    return None if targets is None else targets != IGNORE_INDEX


def next_labels(labels: Tensor | None) -> Tensor | None:
    """The labels of each token's next one [B, T], -100 for the last one's."""
    return None if labels is None else nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def real_tokens(mask: Tensor, new: int) -> Tensor:
    """[B, T] bool, False on padding among the `new` tokens at the end of a mask [B, at least T]."""
    return mask[:, -new:].bool()


def check_images(images: ImageTokens, length: int | None, embeddings: bool, whole: bool, an_image: int) -> None:
    """Raise UserError if the image tokens of a forward are not those of the images.

    Args:
        images: where they are, and how many; what was not counted is not checked.
        length: image tokens that the images fill; None without images.
        embeddings: whether embeddings were given, which may hold the images already.
        whole: whether no image may be cut.
        an_image: the most tokens of an image, for the message.
    """
    counts = images.counts
    if counts is None or (embeddings and length is None and counts.found == 0):
        return
    if counts.wrong:
        raise UserError(
            f"prompt_images and the tokens of this forward differ in {counts.wrong} positions: its columns are the "
            "tokens of the prompt up to the last new one."
        )
    if counts.image != (length or 0):
        raise UserError(
            f"The text has {counts.image} image tokens, the images fill {length or 0} "
            f"({an_image} an image): give text and images to the processor together."
        )
    if whole and images.skip is not None and counts.cut:
        raise UserError(
            f"A sample has a part of an image, whose block is {images.skip.length} tokens: give whole images, or the "
            "image tokens of the whole prompt so far as prompt_images."
        )
