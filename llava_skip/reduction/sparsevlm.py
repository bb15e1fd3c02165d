"""`sparsevlm`: cuts after three layers, by text tokens that concern the image (Zhang et al., ICML 2025, 2410.04417).

Shapes: B batch, H heads, Q asking tokens, N tokens before a cut, M merged tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from llava_skip.reduction.in_decoder import (
    Choice,
    Cut,
    DropRule,
    check_layers,
    fit_ratio,
    mean_over,
    powers,
    rising,
)
from llava_skip.reduction.method import Option
from llava_skip_base.errors import UserError

if TYPE_CHECKING:
    from llava_skip.configuration import LlavaSkipConfig
    from llava_skip.reduction.config import ReductionConfig
    from llava_skip.reduction.stages import CutView, PromptTokens

_LAYERS = (2, 6, 15)
_DEPTH, _TOKENS = 32, 576
_PUBLISHED = (
    {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
)
"""What is kept after each layer, for a mean: SparseVLM, and SparseVLM+."""
_HEADS = 14 / 32
"""SparseVLM+ listens to this share of the heads."""


class SparseVLM(DropRule):
    """After each of `layers` has run, the image tokens with most attention from the raters are kept.

    The raters are the text tokens behind the first image token, in training up to the first answer, whose embedding
    concerns the image more than their mean does (`asking`). The best of the tokens that go are merged to a few new
    ones, and positions are numbered again. `plus=1` is SparseVLM+: no merging, positions stay, attention is divided by
    what positions alone give, and only some heads count.

    With 32 layers, published means (192, 128, 96, 64 of 576 tokens) take the published numbers, in proportion for
    another number of tokens. Their true means are a little larger, since merged tokens and the layers that rank are not
    in them. Everything else keeps the share q, q^2, q^3, with the largest q whose mean is at most TOKENS. `kept` names
    the numbers.
    """

    name = "sparsevlm"
    options: ClassVar[Mapping[str, Option]] = {
        "layers": Option(many=True),
        "kept": Option(least=1, many=True),
        "plus": Option(0, most=1),
    }

    def check_numbers(self, reduction: ReductionConfig) -> None:
        """Either the mean or the numbers that are kept."""
        if (reduction.tokens is None) == (reduction["kept"] is None):
            raise UserError(
                f"reduction {reduction}: give the mean, as sparsevlm:192, or numbers, as sparsevlm:kept=300+200+110."
            )

    def renumbered(self, reduction: ReductionConfig) -> bool:
        """SparseVLM+ keeps the positions."""
        return not reduction["plus"]

    def cuts(self, reduction: ReductionConfig, layers: int, tokens: int) -> tuple[Cut, ...]:
        """One behind each of the layers."""
        if reduction.tokens == tokens:
            return ()
        named = reduction["layers"]
        if named is not None:
            check_layers(reduction, named, layers - 1, least=0)
        behind = rising([1 + layer for layer in named or [n * layers / _DEPTH for n in _LAYERS]], layers)
        numbers = self._numbers(reduction, layers, tokens)
        if numbers is None:

            def mean(ratio: float) -> float:
                cuts = {cut.layer: cut for cut in powers(behind, ratio, tokens)}
                left, total = tokens, 0
                for layer in range(layers):
                    left = self.left(reduction, cuts[layer], tokens, left) if layer in cuts else left
                    total += left
                return total / layers

            return powers(behind, fit_ratio(reduction, mean), tokens)
        if len(numbers) < len(behind):
            raise UserError(f"reduction {reduction}: {len(behind)} layers need as many numbers in kept.")
        return tuple(Cut(layer, kept, tokens) for layer, kept in zip(behind, numbers, strict=False))

    def _numbers(self, reduction: ReductionConfig, count: int, tokens: int) -> tuple[int, ...] | None:
        """What is kept after each layer, where that is given or published."""
        if (kept := reduction["kept"]) is not None:
            return kept
        for mean, numbers in _PUBLISHED[reduction["plus"]].items():
            if count == _DEPTH and reduction["layers"] is None and mean * tokens == reduction.count * _TOKENS:
                return tuple(max(1, round(number * tokens / _TOKENS)) for number in numbers)
        return None

    def left(self, reduction: ReductionConfig, cut: Cut, tokens: int, before: int) -> int:
        """What is kept, at least one token fewer than before, and what is merged of the others."""
        kept = max(1, min(cut.count(tokens), before - 1))
        merged = 0 if reduction["plus"] or kept == before else merging(before - kept)[1]
        return kept + merged

    def extra_flops(
        self,
        reduction: ReductionConfig,
        config: LlavaSkipConfig,
        crops: int,
        text_tokens: int,
        behind: int | None = None,
        asking: int | None = None,
    ) -> int:
        """Also the products of image and text that name the raters; distances between tokens are left out."""
        products = 2 * config.image_length(crops) * (text_tokens if behind is None else behind)
        found = super().extra_flops(reduction, config, crops, text_tokens, behind, asking)
        return found + products * config.text_config.hidden_size if found else 0

    def expected_asking(self, text_tokens: int) -> int:
        """About half of the text is above the mean."""
        return -(-text_tokens // 2)

    def products(
        self, reduction: ReductionConfig, config: LlavaSkipConfig, asking: int, tokens: int, merged: int
    ) -> list[tuple[int, int, int]]:
        """Also those that merge, or the ones of positions alone."""
        text = config.text_config
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        own = (asking, head_width, tokens) if reduction["plus"] else (merged, tokens, text.hidden_size)
        return [*super().products(reduction, config, asking, tokens, merged), own]

    def asking(self, prompt: PromptTokens, embeddings: Tensor) -> Tensor:
        """Text tokens of which the softmax over text of (image . text), averaged over the image, is above its mean.

        Where none is (as with one token of text), all of them; where there is no text, the last prompt token.
        """
        is_text = prompt.behind_images
        text, is_real = prompt.pack(is_text)
        image, is_image = prompt.pack(prompt.is_image)
        words, patches = (
            embeddings.gather(1, index.unsqueeze(-1).expand(-1, -1, embeddings.shape[2])) for index in (text, image)
        )
        products = (patches @ words.transpose(1, 2)).float().masked_fill(~is_real[:, None, :], -torch.inf)
        weights = mean_over(products.softmax(dim=2).nan_to_num(), is_image)
        mean = mean_over(weights.unsqueeze(-1), is_real)
        above = (weights > mean) & is_real
        above = torch.where(above.any(dim=1, keepdim=True), above, is_real)
        # Padding of `text` may name a token that is there as well: nothing is added for it.
        asking = torch.zeros_like(is_text, dtype=torch.uint8).scatter_add_(1, text, above.to(torch.uint8)).bool()
        return torch.where(asking.any(dim=1, keepdim=True), asking, prompt.last)

    def choose(self, view: CutView, cut: Cut, reduction: ReductionConfig) -> Choice:
        """The best by the raters' mean attention, and the merged ones of the others."""
        attention, is_asking = view.attention()
        if reduction["plus"]:
            attention = attention / view.position_kernel()[:, None]
            per_head = (attention * is_asking[:, None, :, None]).masked_fill(~view.is_image[:, None, None], 0)
            heads = per_head.sum(dim=(2, 3)).topk(max(1, round(attention.shape[1] * _HEADS)), dim=1).indices
            attention = attention.gather(1, heads[..., None, None].expand(-1, -1, *attention.shape[2:]))
        scores = mean_over(attention.mean(dim=1), is_asking)
        counts = torch.minimum(view.counts(cut), view.is_image.sum(dim=1) - 1).clamp(min=1)
        keep = view.keep(scores, counts)
        return Choice(keep) if reduction["plus"] else self._merge(view, scores, keep)

    def _merge(self, view: CutView, scores: Tensor, keep: Tensor) -> Choice:
        assert view.outputs is not None  # the layer has run
        weights = []
        for sample, dropped in enumerate(~keep):
            gone = dropped.nonzero().squeeze(1)
            taken, groups = merging(len(gone))
            best = gone[scores[sample, gone].argsort(descending=True, stable=True)[:taken]]
            member = scores.new_zeros(groups, keep.shape[1])
            if groups:
                member[density_peaks(view.outputs[sample, best].float(), groups), best] = 1
            weights.append(member / member.sum(dim=1, keepdim=True).clamp(min=1))
        merged = nn.utils.rnn.pad_sequence(weights, batch_first=True)
        return Choice(keep, merged, merged.any(dim=2))


def merging(dropped: int) -> tuple[int, int]:
    """Of `dropped` tokens, how many are merged, and to how many."""
    taken = min(dropped, int(dropped * 0.3) + 1)
    return taken, int(taken / 10) + 1 if taken else 0


def density_peaks(tokens: Tensor, groups: int) -> Tensor:
    """Cluster tokens [n, D] by density peaks with nearest neighbours; [n], the group of each.

    Distances are divided by the root of D. Density is exp(-mean squared distance to the `groups` nearest tokens, itself
    included), and the centres are the tokens for which density times the distance to a denser token is largest.
    """
    distances = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") / tokens.shape[1] ** 0.5
    density = (-distances.topk(groups, dim=1, largest=False).values.square().mean(dim=1)).exp()
    is_denser = density[None, :] > density[:, None]
    apart = distances.where(is_denser, distances.max()).min(dim=1).values
    centres = (apart * density).argsort(descending=True, stable=True)[:groups]
    group = distances[:, centres].argmin(dim=1)
    return group.index_copy(0, centres, torch.arange(groups, device=group.device))
