"""What the attention and the FFN of one decoder layer can add to a token at most, from the weights alone.

The theorems that are named here are those of docs/theory.md. Shapes: D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from eval.study.analysis.spectral import largest_singular_value

SILU = ("silu", "swish")
"""Names of the activation of a SwiGLU FFN in `hidden_act`."""
FFN_WEIGHTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Affine:
    """|W z + b| <= `factor` |z| + `offset`.

    Attributes:
        factor: an upper bound of the largest singular value of W.
        offset: |b|, 0 without a bias.
    """

    factor: float
    offset: float = 0.0

    @classmethod
    def of(cls, linear: nn.Linear) -> Affine:
        """Of a linear layer."""
        offset = 0.0 if linear.bias is None else float(linear.bias.detach().double().norm())
        return cls(largest_singular_value(linear.weight).upper, offset)

    def at(self, norms: Any) -> Any:
        """The bound for inputs with these norms."""
        return self.factor * norms + self.offset


@dataclass(frozen=True)
class FfnBound:
    """|FFN(n)| <= s(down) s(gate) s(up) |n|^2, with biases where there are any (theorem 1).

    Attributes:
        gate, up, down: of the three weights.
        largest_input: max|g| sqrt(D), at least |n| for every n that leaves the norm before the FFN.
    """

    gate: Affine
    up: Affine
    down: Affine
    largest_input: float

    @classmethod
    def of(cls, layer: Any) -> FfnBound:
        """Of a decoder layer."""
        gate, up, down = (Affine.of(getattr(layer.mlp, name)) for name in FFN_WEIGHTS)
        return cls(gate, up, down, largest_norm(layer.post_attention_layernorm))

    def at(self, norms: Any) -> Any:
        """For inputs n with these norms |n|."""
        return self.down.at(self.gate.at(norms) * self.up.at(norms))

    @property
    def anywhere(self) -> float:
        """For every input."""
        return self.at(self.largest_input)


def largest_norm(norm: nn.Module) -> float:
    """max|g| sqrt(D): RMSNorm gives vectors of at most this length, since x / sqrt(mean(x^2) + eps) has sqrt(D)."""
    gain: Any = norm.weight
    return float(gain.detach().abs().max()) * math.sqrt(gain.numel())


def attention_bound(layer: Any) -> float:
    """At least |Attention(norm(X))_t|, for every sequence X and token t (theorem 3).

    Each head gives a mean of its values, so its output is no longer than its longest value.
    """
    attention = layer.self_attn
    largest = largest_norm(layer.input_layernorm)
    weight, bias = attention.v_proj.weight.detach(), attention.v_proj.bias
    heads = weight.view(-1, attention.head_dim, weight.shape[1])
    offsets = [0.0] * len(heads) if bias is None else bias.detach().view(len(heads), -1).norm(dim=1).tolist()
    values = [
        largest_singular_value(head).upper * largest + offset for head, offset in zip(heads, offsets, strict=True)
    ]
    repeats = attention.o_proj.in_features // weight.shape[0]  # query heads that share a head of keys and values
    return float(Affine.of(attention.o_proj).at(math.sqrt(repeats * sum(value**2 for value in values))))


def hidden_product(mlp: Any, normed: Tensor) -> Tensor:
    """silu(gate n) * up n of [..., D], which the last weight of the FFN takes."""
    return mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)


def why_unbounded(config: PreTrainedConfig, layers: nn.ModuleList) -> str | None:
    """Why the bounds do not hold for a language model, None if they do."""
    if config.hidden_act not in SILU:
        return (
            f"The activation of the language model ({config.model_type}) is hidden_act {config.hidden_act!r}; "
            f"the bounds are those of a SwiGLU FFN, with {SILU[0]!r}."
        )
    for number, layer in enumerate(layers):
        for name in FFN_WEIGHTS:
            part = getattr(layer.mlp, name, None)
            if not isinstance(part, nn.Linear) or not part.weight.is_floating_point():
                return f"Layer {number} has no {name} with weights as plain numbers, so no singular values are known."
    return None
