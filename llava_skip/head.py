"""The head, and a loss whose memory does not grow with the supervised tokens.

Shapes: M supervised tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # before transformers 5.23, which vLLM asks for

    def slice_logits_to_keep(states: Tensor, kept: int | Tensor) -> Tensor:
        """States [B, T, D] -> those of the last `kept` tokens, 0 for all, or of the tokens that a tensor names."""
        return states[:, slice(-kept, None) if isinstance(kept, int) else kept, :]


LOGITS_AT_ONCE = 512 * 2**20
"""Bytes of the float32 logits that exist at one time; for 128,256 tokens of a vocabulary, 1,046 supervised tokens."""


def rows_at_once(vocabulary: int) -> int:
    """Supervised tokens whose logits exist at one time."""
    return max(1, LOGITS_AT_ONCE // (4 * vocabulary))


class Head(nn.Linear):
    """A linear layer without bias that gives logits [..., V]; or, with targets [M], the sum of their cross entropies.

    Both are one call of the module, however many tokens there are: ZeRO-3 gathers weights for a module's call, and
    every rank must make the same calls.

    Attributes:
        fused: weight [V, D], states [M, D] and targets [M] -> the sum, by a kernel of a device; None: by torch.
    """

    fused: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def forward(self, states: Tensor, targets: Tensor | None = None) -> Tensor:
        """States [..., D] -> logits; states [M, D] and targets -> the sum, in float32."""
        if targets is None:
            return super().forward(states)
        if self.fused is not None:
            return self.fused(self.weight, states, targets)
        loss: Tensor = _SummedLoss.apply(states, self.weight, targets, torch.is_grad_enabled())
        return loss


def summed_loss(head: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    """The sum of the cross entropies of M tokens; few tokens at a time, where their logits are many, or by a kernel.

    Args:
        head: states [M, D] -> logits [M, V].
        states: [M, D].
        targets: [M], the next tokens.
    """
    compiled = torch.compiler.is_compiling()  # a graph cannot depend on the number of tokens
    most = rows_at_once(head.out_features) if isinstance(head, Head) and head.fused is None else 0
    if isinstance(head, Head) and not compiled and len(states) > most:
        return head(states, targets)
    return nn.functional.cross_entropy(head(states).float(), targets, reduction="sum")


class _SummedLoss(torch.autograd.Function):
    """Makes the gradients along with the loss, while logits exist, so that none are kept and none are made again."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, trains: bool) -> Tensor:
        for_states, for_weight = (trains and needed for needed in ctx.needs_input_grad[:2])
        loss = torch.zeros((), device=states.device)
        grad_states = torch.empty_like(states) if for_states else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None  # a sum of many parts
        parts = -(-len(states) // rows_at_once(weight.shape[0]))
        size = -(-len(states) // parts)
        for first in range(0, len(states), size):
            part = slice(first, first + size)
            own = None if grad_states is None else grad_states[part]
            loss += _add_part(states[part], weight, targets[part].unsqueeze(-1), own, grad_weight)
        ctx.dtype = weight.dtype
        if grad_weight is not None and weight.dtype != torch.float16:  # there, a sum of many tokens is too large
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_states, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_states, grad_weight = ctx.saved_tensors
        given = [None if one is None else one * grad for one in (grad_states, grad_weight)]
        return given[0], None if given[1] is None else given[1].to(ctx.dtype), None, None


def _add_part(
    states: Tensor, weight: Tensor, targets: Tensor, grad_states: Tensor | None, grad_weight: Tensor | None
) -> Tensor:
    """The loss of a part, [m, D] with targets [m, 1]; its gradients are written, and added to that of the weight."""
    logits = nn.functional.linear(states, weight)
    numbers = logits.float()
    numbers -= numbers.amax(dim=-1, keepdim=True)
    at_target = numbers.gather(-1, targets)
    sums = numbers.exp_().sum(dim=-1, keepdim=True)
    loss = (sums.log() - at_target).sum()
    if grad_states is None and grad_weight is None:
        return loss
    # The gradient of a token's logits: their softmax, minus 1 at its target.
    grad = numbers.div_(sums).scatter_add_(-1, targets, -torch.ones_like(sums)).to(logits.dtype)
    if grad_states is not None:
        grad_states.copy_(grad @ weight)
    if grad_weight is not None:
        grad_weight += grad.T @ states
    return loss
