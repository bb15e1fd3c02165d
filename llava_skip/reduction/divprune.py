"""`divprune`: the tokens that are least like each other (DivPrune, arXiv 2503.02175)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava_skip.reduction.choosing import ascending, cosines
from llava_skip.reduction.method import Selection

if TYPE_CHECKING:
    from llava_skip.reduction.config import ReductionConfig
    from llava_skip.vision.view import View


@torch.no_grad()
def most_diverse(tokens: Tensor, count: int) -> Tensor:
    """Indices [N, T], ascending, chosen one after the other by cosine distance (greedy max-min diversity).

    First the token whose nearest other one is farthest; then always the token whose nearest chosen one is farthest.

    Args:
        tokens: [N, P, D].
        count: T.
    """
    distance = 1 - cosines(tokens, tokens)
    itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    chosen = [distance.masked_fill(itself, torch.inf).amin(dim=1).argmax(dim=1, keepdim=True)]
    nearest = torch.full_like(distance[:, 0], torch.inf)
    for _ in range(count - 1):
        row = distance.gather(1, chosen[-1].unsqueeze(-1).expand(-1, -1, tokens.shape[1])).squeeze(1)
        # What is chosen never comes again, even among tokens that are all alike.
        nearest = torch.minimum(nearest, row).scatter(1, chosen[-1], -torch.inf)
        chosen.append(nearest.argmax(dim=1, keepdim=True))
    return ascending(torch.cat(chosen, dim=1))


class DivPrune(Selection):
    """Of the visual tokens as the language model would get them, so that it fits every front end."""

    name = "divprune"

    def select(self, view: View, reduction: ReductionConfig) -> Tensor:
        """[N, T, D]."""
        return view.keep(most_diverse(view.tokens, reduction.count))
