"""Selecting, merging and summarising visual tokens: two pure functions and one small layer.

Shapes: N images, P visual tokens of an image, R retained, S kept by the merge, C or D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from llava_skip_base.errors import UserError

MERGED_AT_ONCE = 32 * 2**20
"""Bytes of the float32 tokens that are merged at once; an image that has more is merged alone."""


def retained_first(tokens: Tensor, scores: Tensor, retained: int) -> Tensor:
    """Order tokens so that the `retained` highest-scored come first.

    Both groups keep the order of the image, as in the paper's code (which marks the kept patches in a mask).

    Args:
        tokens: [N, P, C].
        scores: [N, P], for LLaVA the attention that the class token pays to each patch, summed over heads.
        retained: R.

    Returns:
        [N, P, C], the same tokens: the R retained by ascending index, then the others by ascending index.
    """
    order = retained_order(scores, retained)
    return tokens.gather(1, order.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def retained_order(scores: Tensor, retained: int) -> Tensor:
    """The permutation of `retained_first`: scores [N, P] -> indices [N, P]."""
    other = torch.ones_like(scores, dtype=torch.uint8)
    other.scatter_(1, scores.topk(retained, dim=1).indices, 0)
    return other.argsort(dim=1, stable=True)


def merge_choices(tokens: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The choices of one step of bipartite soft matching; computed in float32, without gradient.

    A token's centrality is the sum of its cosine similarities to all others: the most central tokens are the most
    redundant and are merged away, each into the kept token that it is most similar to.

    Args:
        tokens: [N, P, C].
        keep: S, at most P.

    Returns:
        centrality [N, P]; order [N, P], indices by descending centrality, of which the first P - S are merged away and
        the last S kept; target [N, P - S], for each merged token the index of its match among the kept ones.
    """
    with maybe_autocast(tokens.device.type, enabled=False):  # which would compute the products in half precision
        unit = nn.functional.normalize(tokens.detach().float(), dim=-1)
        centrality = (unit * (unit.sum(dim=1, keepdim=True) - unit)).sum(dim=-1)
        # Stable, so that equal tokens are ordered alike on every device.
        order = centrality.argsort(dim=1, descending=True, stable=True)
        unit = unit.gather(1, order.unsqueeze(-1).expand_as(unit))
        merged, kept = unit.split([tokens.shape[1] - keep, keep], dim=1)
        return centrality, order, (merged @ kept.transpose(1, 2)).argmax(dim=-1)


def merge_tokens(tokens: Tensor, keep: int) -> Tensor:
    """Merge P tokens to `keep` by one step of bipartite soft matching (Skip-Vision, token merge).

    Every kept token becomes the plain mean of itself and the tokens merged into it; the result is ordered by
    descending centrality. Gradients flow through the means, not through the choices.

    Args:
        tokens: [N, P, C].
        keep: S, between 1 and P; P returns the tokens as they are.

    Returns:
        [N, S, C].

    Raises:
        UserError: `keep` is not between 1 and P.
    """
    total = tokens.shape[1]
    if not 1 <= keep <= total:
        raise UserError(f"Cannot merge {total} tokens to {keep}: keep must be between 1 and {total}.")
    if keep == total:
        return tokens
    return _Merge.apply(tokens, keep)


class _Merge(torch.autograd.Function):
    """The merge, a few images at a time: what it needs while it runs does not grow with their number.

    The gradient of a token is that of the mean which it is in, divided by the number of tokens in it: a look-up.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, keep: int) -> Tensor:
        images, total, width = tokens.shape
        means, sizes = tokens.new_empty(images, keep, width), tokens.new_empty(images, keep, 1)
        means_of = torch.empty(images, total, dtype=torch.long, device=tokens.device)
        at_once = max(1, MERGED_AT_ONCE // (4 * total * width))
        for first in range(0, images, at_once):
            part = slice(first, first + at_once)
            means[part], sizes[part], means_of[part] = _merge(tokens[part], keep)
        ctx.save_for_backward(means_of, sizes)
        return means

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        means_of, sizes = ctx.saved_tensors
        means_of = means_of.unsqueeze(-1)
        shares = grad.gather(1, means_of.expand(-1, -1, grad.shape[-1]))
        return shares.div_(sizes.gather(1, means_of)), None


def _merge(tokens: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [n, P, C] -> means [n, S, C], how many tokens are in each [n, S, 1], the mean of each token [n, P]."""
    images, total, _ = tokens.shape
    _, order, target = merge_choices(tokens, keep)
    ordered = tokens.gather(1, order.unsqueeze(-1).expand_as(tokens))
    merged, kept = ordered.split([total - keep, keep], dim=1)
    # A product with the assignment instead of a scatter of tokens: its sums have one order on every device.
    assignment = tokens.new_zeros(images, total - keep, keep).scatter_(2, target.unsqueeze(-1), 1).transpose(1, 2)
    sizes = 1 + assignment.sum(dim=-1, keepdim=True)
    own = torch.arange(keep, device=tokens.device).expand(images, -1)
    means_of = torch.empty_like(order).scatter_(1, order, torch.cat([target, own], dim=1))
    return (kept + assignment @ merged) / sizes, sizes, means_of


def free_parameter(values: Tensor) -> nn.Parameter:
    """A bare parameter (a query or a summary vector) with its initial values.

    The model's initialisation leaves these values, and draws others only where a checkpoint lacks the parameter.
    """
    parameter = nn.Parameter(values)
    parameter.has_start_values = not values.is_meta  # type: ignore[attr-defined]
    return parameter


class SummaryLayer(nn.Module):
    """One summary token for each group of tokens (paper, section 3.2).

    Pooled: `weights = softmax over tokens of score(norm(x))`, `summary = sum of weights * x` with the raw x; the same
    layer for every group. Mean: equal weights. Learned: a trainable vector for each group, whatever its tokens.
    """

    def __init__(self, width: int, start: str = "pooled", groups: int = 2) -> None:
        super().__init__()
        if start == "pooled":
            self.norm = nn.LayerNorm(width, eps=1e-5)
            self.score = nn.Linear(width, 1)
        self.vectors = free_parameter(torch.randn(groups, width) * 0.02) if start == "learned" else None
        self.start = start

    def weights(self, tokens: Tensor) -> Tensor:
        """[N, P, D] -> [N, P, 1], summing to 1 over P."""
        if self.start == "mean":
            return torch.full_like(tokens[..., :1], 1 / tokens.shape[1])
        return self.score(self.norm(tokens)).softmax(dim=1)

    def forward(self, tokens: Tensor, group: int = 0) -> Tensor:
        """Tokens of a group [N, P, D] and its number -> [N, 1, D]."""
        if self.vectors is not None:
            return self.vectors[group].expand(tokens.shape[0], 1, -1).to(tokens.dtype)
        return (self.weights(tokens) * tokens).sum(dim=1, keepdim=True)
