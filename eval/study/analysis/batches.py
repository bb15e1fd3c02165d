"""Questions as padded batches of a model's inputs, with the kind of each token.

Shapes: B batch, T tokens of a sample, N images of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.study.analysis.questions import Encoded
from llava_skip.configuration import LlavaSkipConfig, SkipConfig

KINDS = ("text", "image", "retained", "skipped", "exempt", "summary")
"""Kinds of a token: `image` in a model that skips nothing, the next four in one that does; `exempt` are the skipped
tokens that keep their FFN (`ffn_head`, `ffn_tail`, `ffn_every`)."""
VISUAL = ("image", "retained", "skipped", "exempt")
"""The kinds that stand for a part of an image of their own: all image tokens but the summaries."""
PADDING = -1


@dataclass(frozen=True)
class Batch:
    """Samples as one padded batch, the padding on the right.

    Attributes:
        inputs: what the model's forward takes: `input_ids` and `attention_mask` [B, T], and `pixel_values` and
            `crop_counts` where there are images.
        kinds: [B, T] the kind of each token, an index into `KINDS`; `PADDING` on padding.
        images: [B, T] the number of the image among the batch's N that a token belongs to; -1 for text.
        last: [B] the last token of the prompt, whose output is the distribution of the answer's first token.
        answers: [B, T] True where a token's next one belongs to an answer; nowhere without answers.
        ids: of the samples.
    """

    inputs: dict[str, Tensor]
    kinds: Tensor
    images: Tensor
    last: Tensor
    answers: Tensor
    ids: tuple[str, ...]

    def of_kinds(self, *names: str) -> Tensor:
        """[B, T] bool, the tokens of these kinds."""
        return torch.isin(self.kinds, torch.tensor([KINDS.index(name) for name in names], device=self.kinds.device))

    def inputs_for(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """`inputs` on the model's device, in its number format."""
        parameter = next(model.parameters())
        return {
            name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            for name, value in self.inputs.items()
        }

    def to(self, device: torch.device) -> Batch:
        """The batch with what is no input of the model on a device."""
        kinds, images, last, answers = (v.to(device) for v in (self.kinds, self.images, self.last, self.answers))
        return Batch(self.inputs, kinds, images, last, answers, self.ids)


def make_batches(samples: Iterable[Encoded], config: LlavaSkipConfig, batch_size: int) -> list[Batch]:
    """Batches of samples of like length, the longest first.

    Args:
        samples: encoded questions.
        config: of the model.
        batch_size: the most samples of a batch.
    """
    ordered = sorted(samples, key=lambda sample: len(sample.input_ids), reverse=True)
    return [make_batch(ordered[n : n + batch_size], config) for n in range(0, len(ordered), batch_size)]


def make_batch(samples: Sequence[Encoded], config: LlavaSkipConfig) -> Batch:
    """One batch of samples, padded on the right."""
    size = (len(samples), max(len(sample.input_ids) for sample in samples))
    ids, mask, answers = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long), torch.zeros(size)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        ids[row, :length], mask[row, :length] = sample.input_ids, 1
        answers[row, : length - 1] = (sample.supervised[1:]).float()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if pixels := [sample.pixel_values for sample in samples if sample.pixel_values is not None]:
        inputs["pixel_values"] = torch.cat(pixels)
    if counts := [sample.crop_counts for sample in samples if sample.crop_counts is not None]:
        inputs["crop_counts"] = torch.cat(counts)
    is_image = (ids == config.image_token_id) & mask.bool()
    last = torch.tensor([sample.prompt_length - 1 for sample in samples])
    return Batch(
        inputs,
        token_kinds(is_image, mask.bool(), config.skip_config),
        image_numbers(is_image, image_lengths(inputs, config)),
        last,
        answers.bool(),
        tuple(sample.id for sample in samples),
    )


def token_kinds(is_image: Tensor, real: Tensor, skip: SkipConfig | None) -> Tensor:
    """The kind of each token.

    Args:
        is_image: [B, T] bool, the image tokens, whole images.
        real: [B, T] bool, False on padding.
        skip: the sizes of an image's block; None for a model that skips nothing.

    Returns:
        [B, T] int8, indices into `KINDS`, `PADDING` on padding.
    """
    block = torch.tensor([KINDS.index(name) for name in block_kinds(skip)], dtype=torch.int8)
    kinds = block[(is_image.cumsum(dim=1) - 1) % len(block)].where(is_image, KINDS.index("text"))
    return kinds.to(torch.int8).where(real, PADDING)


def block_kinds(skip: SkipConfig | None) -> list[str]:
    """The kind of each token of an image's block, in the order of the sequence."""
    if skip is None:
        return ["image"]
    kinds, first_skipped = [], skip.retained
    visual = 0
    for place, skips in enumerate(skip.skipping):
        if place in skip.summary_positions:
            kinds.append("summary")
            continue
        kinds.append("skipped" if skips else "retained" if visual < first_skipped else "exempt")
        visual += 1
    return kinds


def image_lengths(inputs: dict[str, Tensor], config: LlavaSkipConfig) -> list[int]:
    """Image tokens of each image of a batch."""
    if "pixel_values" not in inputs:
        return []
    counts = inputs["crop_counts"].tolist() if "crop_counts" in inputs else [1] * len(inputs["pixel_values"])
    return [config.image_length(crops) for crops in counts]


def image_numbers(is_image: Tensor, lengths: Sequence[int]) -> Tensor:
    """[B, T] the number of the image that a token belongs to, -1 for text; images in the order of their tokens."""
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    return torch.full(is_image.shape, -1).masked_scatter(is_image, numbers)
