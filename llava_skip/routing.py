"""Which tokens of a batch take the FFN and which ones the cache keeps: pure functions on tensors.

Shapes: B batch, T new tokens of a sample, W its tokens so far, D width, M tokens that take the FFN, K tokens that the
cache keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from llava_skip.configuration import SkipConfig
from llava_skip.head_rows import HeadRows
from llava_skip_base.errors import UserError

if TYPE_CHECKING:
    from llava_skip.counts import TokenCounts


@dataclass(frozen=True)
class ImageTokens:
    """Where the image tokens of a sequence are, and which of them are skipped.

    Attributes:
        is_image: [B, W] bool, over all tokens so far, the new ones last; over the new ones alone if these are whole
            images.
        new: T.
        generated: number of tokens at the end that come after the prompt.
        skip: the sizes of an image's block; None for a dense model.
        skipped: [B, W] bool, the skipped visual tokens; None for a dense model.
        counts: how many there are; None if the host does not know it.
    """

    is_image: Tensor
    new: int
    generated: int
    skip: SkipConfig | None
    skipped: Tensor | None
    counts: TokenCounts | None = None

    @classmethod
    def of_forward(
        cls,
        is_image: Tensor,
        skip: SkipConfig | None,
        prompt_images: Tensor | None = None,
        generated: int = 0,
        seen: int = 0,
    ) -> ImageTokens:
        """Those of a forward.

        Args:
            is_image: [B, T] bool, the image tokens among the new tokens.
            skip: the sizes of an image's block; None for a dense model.
            prompt_images: [B, P] bool, the image tokens of the prompt as far as this forward has it; its last column is
                the last new token that is not generated. None: the new tokens are prompt, with whole images.
                Embeddings that hold the images already need it.
            generated: number of new tokens that come after the prompt. An image token among them is text.
            seen: number of tokens before the new ones. Those that `prompt_images` does not reach back to are no image
                tokens, as the vectors that prompt tuning puts before a prompt.

        Raises:
            UserError: `prompt_images` has more columns than there are tokens.
        """
        new = is_image.shape[1]
        if prompt_images is not None:
            before = seen + new - generated - prompt_images.shape[1]
            if before < 0:
                raise UserError(
                    f"prompt_images has {prompt_images.shape[1]} columns, and this forward sees only "
                    f"{seen + new - generated} tokens of the prompt: leave out the columns of later ones."
                )
            is_image = nn.functional.pad(prompt_images, (before, generated))
        return cls(is_image, new, generated, skip, None if skip is None else skipped_tokens(is_image, skip))

    @property
    def in_new(self) -> Tensor:
        """[B, T] bool, the image tokens among the new tokens."""
        return self.is_image[:, -self.new :]

    @property
    def skipped_in_new(self) -> Tensor | None:
        """[B, T] bool, the skipped tokens among the new tokens; None for a dense model."""
        return None if self.skipped is None else self.skipped[:, -self.new :]

    @property
    def numbers(self) -> Tensor:
        """[B, W], the number of the image that a token belongs to, from 1 on; 0 for text. Not for a dense model."""
        assert self.skip is not None  # without blocks of one length images cannot be told apart
        return torch.where(self.is_image, (self.is_image.cumsum(dim=1) - 1) // self.skip.length + 1, 0)


class LayerRunner(Protocol):
    """Runs the decoder layers of one forward."""

    def run(self, layer: Any, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
        """A `SkippingLayer` on what the one before gave, [B, T, D] or fewer tokens; `arguments` are the layer's own."""

    def restore(self, hidden_states: Tensor) -> Tensor:
        """What the last layer gave, as [B, T, D]."""


@dataclass(frozen=True)
class Route:
    """What happens to each token of one forward, computed once and used by every layer.

    Attributes:
        ffn_tokens: [M] flat indices into [B * T] of the tokens that take the FFN; None if all do.
        kept: [B, T] True where the cache keeps the token's keys and values; None if it keeps all.
        longest: the most tokens of a sample that `kept` keeps; None if the host does not know it.
        real: [B, T] False on padding; None if nothing is padded.
        layers: the layers that the route is for; None: all. The others run all tokens.
        runner: runs each layer instead of all this, for a reduction inside the decoder; None without one.
        head: what the last layer computes alone; None: all tokens.
    """

    ffn_tokens: Tensor | None = None
    kept: Tensor | None = None
    longest: int | None = None
    real: Tensor | None = None
    layers: tuple[int, ...] | None = None
    runner: LayerRunner | None = None
    head: HeadRows | None = None

    def with_head(self, head: HeadRows | None, images: ImageTokens) -> Route:
        """The route with a last layer for the head alone, in which the same tokens leave out the FFN as before."""
        if head is None or (self.layers is not None and head.layer not in self.layers):
            return replace(self, head=head)
        skipped, real = images.skipped_in_new, self.real
        stay = skipped if real is None else ~real if skipped is None else skipped | ~real
        return replace(self, head=replace(head, stay=stay))

    def ffn_tokens_in(self, layer: int) -> Tensor | None:
        """`ffn_tokens` in this layer; None if all tokens take its FFN."""
        return self.ffn_tokens if self.layers is None or layer in self.layers else None


def skipped_tokens(is_image: Tensor, skip: SkipConfig) -> Tensor:
    """True where a token is a skipped visual token.

    Every image takes `skip.length` image tokens, so a token's position in its block is its count in the sample modulo
    that number: any offset, any number of images a sample, adjacent images included.

    Args:
        is_image: [B, W] bool, the image tokens, from the first one of an image on.
        skip: the sizes of an image's block.

    Returns:
        [B, W] bool.
    """
    position = (is_image.cumsum(dim=1) - 1) % skip.length
    # The tensors of a graph that is being traced are none to keep.
    table = _skipping.__wrapped__ if torch.compiler.is_compiling() else _skipping
    return is_image & table(skip, is_image.device)[position]


@lru_cache(maxsize=32)
def _skipping(skip: SkipConfig, device: torch.device) -> Tensor:
    """`skip.skipping` as a tensor on the device: copied there once, not in every forward."""
    return torch.tensor(skip.skipping, device=device)


def make_route(images: ImageTokens, real: Tensor | None) -> Route:
    """The route of a forward over images and text (a prefill or a piece of one, or a training step).

    In a dense model padding still costs no FFN.

    Args:
        images: where the image tokens are.
        real: [B, T] bool, False on padding; None if nothing is padded.
    """
    skip, skipped, ffn, counts = images.skip, images.skipped_in_new, real, images.counts
    if skipped is not None:
        ffn = ~skipped if real is None else real & ~skipped
    if ffn is None:
        return Route()
    tokens = true_indices(ffn, None if counts is None else counts.ffn)
    if not torch.compiler.is_exporting() and tokens.numel() == ffn.numel():
        return Route(real=real)
    kept = ffn if skip is not None and skip.forget_cache else None
    longest = None if counts is None else counts.longest
    return Route(tokens, kept, longest, real, skip.layers if skip else None)


def true_indices(flags: Tensor, number: int | None) -> Tensor:
    """Flat indices [number] of the True ones, in order; without their number the device is read for it."""
    if number is None:
        return flags.flatten().nonzero().squeeze(1)
    return flags.flatten().nonzero_static(size=number).squeeze(1)


def place_images(features: Tensor, embeddings: Tensor, images: ImageTokens) -> Tensor:
    """Embeddings [B, T, D] with the image tokens replaced by the blocks of the images [N * L, D], in order."""
    features = features.to(embeddings)
    if images.counts is None:
        return embeddings.masked_scatter(images.in_new.unsqueeze(-1), features)
    # Not masked_scatter: its backward pass reads from the device how many tokens it selects.
    tokens = true_indices(images.in_new, images.counts.image)
    return embeddings.flatten(0, 1).index_copy(0, tokens, features).view_as(embeddings)


def take_tokens(hidden_states: Tensor, tokens: Tensor) -> Tensor:
    """Gather tokens: [B, T, ...] and flat indices [M] -> [M, ...]."""
    return hidden_states.flatten(0, 1).index_select(0, tokens)


def add_to_tokens(hidden_states: Tensor, tokens: Tensor, update: Tensor) -> Tensor:
    """Put back: [B, T, D] with `update` [M, D] added at the flat indices `tokens` [M]; the others unchanged."""
    flat = hidden_states.flatten(0, 1)
    return flat.index_add(0, tokens, update.to(flat.dtype)).view_as(hidden_states)


def align_right(kept: Tensor, longest: int | None = None) -> tuple[Tensor, Tensor]:
    """Where the kept tokens of each sample come from when they are packed to the right end.

    Args:
        kept: [B, T] bool.
        longest: K; None: the device is read for it.

    Returns:
        index [B, K] into T, in order, K the largest number that a sample keeps; and valid [B, K], False on the
        positions before those of a sample that keeps fewer.
    """
    longest = int(kept.sum(dim=1).max()) if longest is None else longest
    order = kept.to(torch.uint8).argsort(dim=1, stable=True)
    index = order[:, order.shape[1] - longest :]
    return index, kept.gather(1, index)
