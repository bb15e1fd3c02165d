"""The contract of a method that drops an image's tokens between decoder layers, and the numbers that several share.

`stages.py` runs it; a method says where tokens are dropped, which tokens ask, and which of the image's are kept.

Shapes: B batch, T tokens of a forward, N tokens that are left of them before a cut, M merged tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from llava_skip.reduction.method import LayerRows, Reduction
from llava_skip_base.errors import UserError

if TYPE_CHECKING:
    from llava_skip.configuration import LlavaSkipConfig
    from llava_skip.reduction.config import ReductionConfig
    from llava_skip.reduction.stages import CutView, PromptTokens


class Cut(NamedTuple):
    """From layer `layer` on, `kept` of each `of` image tokens are left."""

    layer: int
    kept: int
    of: int

    def count(self, tokens: int) -> int:
        """How many are left of the `tokens` image tokens that a sample began with."""
        return (2 * tokens * self.kept + self.of) // (2 * self.of)


@dataclass(frozen=True)
class Choice:
    """What a method keeps at a cut.

    Attributes:
        keep: [B, N] bool.
        merged: [B, M, N], weights of new tokens that are sums of old ones; they come behind the last image token.
        is_merged: [B, M] bool, False where a sample has fewer of them.
    """

    keep: Tensor
    merged: Tensor | None = None
    is_merged: Tensor | None = None


class DropRule(Reduction):
    """A method that drops image tokens between layers; TOKENS is the mean of an image's tokens over the layers.

    Attributes:
        scores_before: whether a cut is decided by attention in the first layer behind it, before that layer runs, and
            not in the last layer in front of it.
        renumbers: whether the tokens behind a cut are numbered without gaps.
    """

    in_decoder = True
    needs_tokens = False
    scores_before: ClassVar[bool] = False
    renumbers: ClassVar[bool] = False

    def cuts(self, reduction: ReductionConfig, layers: int, tokens: int) -> tuple[Cut, ...]:
        """Where tokens are dropped, in the order of the layers; empty if all are kept.

        Args:
            reduction: the numbers.
            layers: L of the decoder.
            tokens: P of a crop.

        Raises:
            UserError: the numbers do not fit the model.
        """
        raise NotImplementedError

    def asking(self, prompt: PromptTokens, embeddings: Tensor) -> Tensor:
        """[B, T] bool, the tokens whose attention decides; `embeddings` [B, T, D] are those that enter the decoder."""
        raise NotImplementedError

    def choose(self, view: CutView, cut: Cut, reduction: ReductionConfig) -> Choice:
        """What is kept at a cut: here the image tokens with most attention, over heads and then asking tokens."""
        probabilities, is_asking = view.attention()
        scores = mean_over(probabilities.mean(dim=1), is_asking)
        return Choice(view.keep(scores, view.counts(cut)))

    def renumbered(self, reduction: ReductionConfig) -> bool:
        """Whether the tokens behind a cut are numbered without gaps."""
        return self.renumbers

    def left(self, reduction: ReductionConfig, cut: Cut, tokens: int, before: int) -> int:
        """Tokens of an image behind a cut: of `tokens` at the start, `before` in front of it."""
        return cut.count(tokens)

    def check(self, reduction: ReductionConfig, config: LlavaSkipConfig) -> None:
        """The cuts fit the model, and its attention fits a cache of which layers store different tokens."""
        tokens = config.visual_tokens(1)
        if reduction.tokens is not None and reduction.tokens > tokens:
            raise UserError(f"reduction {reduction}: an image has {tokens} tokens: give at most {tokens}.")
        if self.cuts(reduction, config.text_config.num_hidden_layers, tokens):
            check_attention(reduction, config)

    def layer_rows(self, reduction: ReductionConfig, config: LlavaSkipConfig, crops: int) -> list[LayerRows]:
        """For each decoder layer the tokens of an image with `crops` crops."""
        tokens, layers = config.image_length(crops), config.text_config.num_hidden_layers
        cuts = {cut.layer: cut for cut in self.cuts(reduction, layers, config.visual_tokens(1))}
        left, rows = tokens, []
        for layer in range(layers):
            left = self.left(reduction, cuts[layer], tokens, left) if layer in cuts else left
            rows.append(LayerRows(left, left, left, left))
        return rows

    def extra_flops(
        self,
        reduction: ReductionConfig,
        config: LlavaSkipConfig,
        crops: int,
        text_tokens: int,
        behind: int | None = None,
        asking: int | None = None,
    ) -> int:
        """The queries of the asking tokens and their products with all keys, at each cut."""
        asking = self.expected_asking(text_tokens) if asking is None else asking
        rows, total = self.layer_rows(reduction, config, crops), 0
        for cut in self.cuts(reduction, len(rows), config.visual_tokens(1)):
            before = rows[cut.layer - 1].queries
            merged = rows[cut.layer].queries - max(1, min(cut.count(rows[0].queries), before))
            products = self.products(reduction, config, asking, before + text_tokens, max(0, merged))
            total += sum(2 * m * k * n for m, k, n in products)
        return total

    def expected_asking(self, text_tokens: int) -> int:
        """How many tokens ask, where that is not known."""
        return 1

    def products(
        self, reduction: ReductionConfig, config: LlavaSkipConfig, asking: int, tokens: int, merged: int
    ) -> list[tuple[int, int, int]]:
        """Sizes of the matrix products that decide a cut.

        Args:
            reduction: the numbers.
            config: of the model.
            asking: Q.
            tokens: N, those of the stage before, text included.
            merged: M.
        """
        text = config.text_config
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        queries, keys = text.num_attention_heads * head_width, text.num_key_value_heads * head_width
        found = [(asking, text.hidden_size, queries), (asking, queries, tokens)]
        return [*found, (tokens, text.hidden_size, keys)] if self.scores_before else found


def check_attention(reduction: ReductionConfig, config: LlavaSkipConfig) -> None:
    """Raise UserError if a layer attends in a window: it would count the tokens that are left."""
    text = config.text_config
    window, kinds = getattr(text, "sliding_window", None), set(getattr(text, "layer_types", None) or ())
    if window is not None and (not kinds or kinds - {"full_attention"}):
        raise UserError(
            f"reduction {reduction} drops tokens inside the decoder, and this language model attends in a sliding "
            f"window of {window} tokens, which would count the tokens that are left: set sliding_window to null in "
            "text_config, which changes nothing for sequences that fit the window."
        )


def keep_best(scores: Tensor, is_image: Tensor, counts: Tensor) -> Tensor:
    """True for text and for the image tokens with the largest scores; of equal ones the earlier is kept.

    Args:
        scores: [B, N].
        is_image: [B, N] bool.
        counts: [B], how many image tokens a sample keeps.

    Returns:
        [B, N] bool.
    """
    order = scores.masked_fill(~is_image, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return ~is_image | (rank < counts[:, None])


def mean_over(values: Tensor, valid: Tensor) -> Tensor:
    """The mean of [B, Q, N] over the Q that are valid, [B, Q] bool -> [B, N]; zero where none is."""
    weights = valid.to(values.dtype).unsqueeze(-1)
    return (values * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def rising(layers: Sequence[float], count: int) -> tuple[int, ...]:
    """Layers rounded, moved up until each is above the one before and from 1 on; those past the last layer left out."""
    found: list[int] = []
    for layer in layers:
        found.append(max(round(layer), found[-1] + 1 if found else 1))
    return tuple(layer for layer in found if layer < count)


def check_layers(reduction: ReductionConfig, layers: Sequence[int], count: int, least: int = 1) -> None:
    """Raise UserError if the layers of an option do not rise or are not in the model."""
    if list(layers) != sorted(set(layers)) or not layers or layers[0] < least or layers[-1] >= count:
        raise UserError(
            f"reduction {reduction}: layers must rise and be from {least} to {count - 1}, since the language model has "
            f"{count} layers."
        )


def fit_ratio(reduction: ReductionConfig, mean: Callable[[float], float]) -> float:
    """The largest share q that an image keeps at each cut, so that `mean` of it is at most TOKENS.

    Args:
        reduction: has TOKENS.
        mean: the mean of an image's tokens over the layers for a q; it does not fall with q.

    Raises:
        UserError: even the smallest q has a larger mean.
    """
    budget = reduction.count
    if mean(0.0) > budget:
        raise UserError(
            f"reduction {reduction}: the layers before the first cut alone have more tokens than a mean of {budget} "
            f"allows; give at least {-int(-mean(0.0) // 1)}, or earlier layers."
        )
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) <= budget else (low, middle)
    return low


def powers(layers: Sequence[int], ratio: float, tokens: int) -> tuple[Cut, ...]:
    """Cuts at which an image of `tokens` tokens is left with the share ratio, ratio^2, ratio^3 ..., at least one."""
    return tuple(Cut(layer, max(1, round(tokens * ratio ** (n + 1))), tokens) for n, layer in enumerate(layers))
