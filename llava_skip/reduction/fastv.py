"""`fastv`: one cut, by the attention of the last prompt token (Chen et al., ECCV 2024, arXiv 2403.06764)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from llava_skip.reduction.in_decoder import Cut, DropRule
from llava_skip.reduction.method import Option
from llava_skip_base.errors import UserError

if TYPE_CHECKING:
    from llava_skip.reduction.config import ReductionConfig
    from llava_skip.reduction.stages import PromptTokens


class FastV(DropRule):
    """Layers before K run on all tokens; of those, the ones with most attention in layer K - 1 go on.

    The last prompt token asks; in training it is the one before the first supervised token. K is `first_layer`, by
    default 2 of 32 layers and in proportion (at least 1). `kept` is the number that goes on; with TOKENS, the mean over
    the L layers, it is (L TOKENS - K P) / (L - K), rounded. Positions stay. Decoding does not rank again.
    """

    name = "fastv"
    options: ClassVar[Mapping[str, Option]] = {"first_layer": Option(least=1), "kept": Option(least=1)}

    def check_numbers(self, reduction: ReductionConfig) -> None:
        """Either the mean or the number that is kept."""
        if (reduction.tokens is None) == (reduction["kept"] is None):
            raise UserError(f"reduction {reduction}: give the mean, as fastv:128, or the number, as fastv:kept=288.")

    def cuts(self, reduction: ReductionConfig, layers: int, tokens: int) -> tuple[Cut, ...]:
        """One, before layer K."""
        first = reduction["first_layer"] or max(1, round(layers / 16))
        if first >= layers:
            raise UserError(f"reduction {reduction}: first_layer is {first}, the language model has {layers} layers.")
        kept = reduction["kept"]
        if kept is None:
            kept = int((layers * reduction.count - first * tokens) / (layers - first) + 0.5)
        if kept < 1:
            least = -(-(first * tokens + layers - first) // layers)
            raise UserError(
                f"reduction {reduction}: the {first} layers before the cut alone have a mean of "
                f"{first * tokens / layers:.1f} tokens; give at least {least}, or an earlier first_layer."
            )
        if kept > tokens:
            raise UserError(f"reduction {reduction}: kept is {kept}, an image has {tokens} tokens.")
        return () if kept == tokens else (Cut(first, kept, tokens),)

    def asking(self, prompt: PromptTokens, embeddings: Tensor) -> Tensor:
        """The last prompt token."""
        return prompt.last
