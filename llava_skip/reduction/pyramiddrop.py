"""`pyramiddrop`: cuts at several depths, also in training (Xing et al., CVPR 2025, arXiv 2410.17247)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from llava_skip.reduction.in_decoder import Cut, DropRule, check_layers, fit_ratio, powers, rising
from llava_skip.reduction.method import Option
from llava_skip_base.errors import UserError

if TYPE_CHECKING:
    from llava_skip.reduction.config import ReductionConfig
    from llava_skip.reduction.stages import PromptTokens

_SHARES = (0.5, 0.25, 0.125)
_STAGES = (1 / 4, 1 / 2, 3 / 4)
_EARLY_STAGES = (1 / 16, 1 / 4, 1 / 2)


class PyramidDrop(DropRule):
    """Before each of `layers`, the image keeps `shares` of its tokens, by attention with that layer's own weights.

    The last prompt token asks; in training, every token just before an answer begins, and a sample without an answer
    keeps all. Positions are numbered again after each cut. Without TOKENS the shares are the published ones, .5 .25
    .125 at a quarter, a half and three quarters of the layers. With TOKENS they are q, q^2, q^3, with the largest q
    whose mean is at most TOKENS; below the published mean (15/32 of the tokens) the cuts are at 1/16, 1/4 and 1/2 of
    the layers, for which there is no published schedule.
    """

    name = "pyramiddrop"
    options: ClassVar[Mapping[str, Option]] = {
        "layers": Option(least=1, many=True),
        "shares": Option(most=1, whole=False, many=True),
    }
    scores_before = True
    renumbers = True

    def check_numbers(self, reduction: ReductionConfig) -> None:
        """Not both the mean and the shares; as many shares as layers, falling."""
        shares = reduction["shares"]
        if reduction.tokens is not None and shares is not None:
            raise UserError(f"reduction {reduction}: the shares follow from TOKENS: give one of them.")
        if shares is not None and list(shares) != sorted(shares, reverse=True):
            raise UserError(f"reduction {reduction}: shares are of the tokens at the start, so they cannot rise.")

    def cuts(self, reduction: ReductionConfig, layers: int, tokens: int) -> tuple[Cut, ...]:
        """One before each of the layers."""
        starts = reduction["layers"]
        if starts is None:
            early = reduction.tokens is not None and 32 * reduction.tokens < 15 * tokens
            starts = rising([share * layers for share in (_EARLY_STAGES if early else _STAGES)], layers)
        check_layers(reduction, starts, layers)
        if reduction.tokens is None:
            shares = reduction["shares"] or _SHARES
            if len(shares) < len(starts):
                raise UserError(f"reduction {reduction}: {len(starts)} layers need as many shares.")
            cuts = tuple(Cut(n, max(1, int(tokens * share)), tokens) for n, share in zip(starts, shares, strict=False))
        else:

            def mean(ratio: float) -> float:
                left = [cut.kept for cut in powers(starts, ratio, tokens)]
                spans = zip([*starts, layers], [0, *starts], [tokens, *left], strict=True)
                return sum((end - start) * rows for end, start, rows in spans) / layers

            cuts = powers(starts, fit_ratio(reduction, mean), tokens)
        return tuple(cut for cut in cuts if cut.kept < tokens)

    def asking(self, prompt: PromptTokens, embeddings: Tensor) -> Tensor:
        """The last prompt token, or those just before an answer."""
        return prompt.last if prompt.supervised is None else prompt.answers
