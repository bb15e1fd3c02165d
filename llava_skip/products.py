"""Matrix products of a module's forward, by what its backward pass repeats of them."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Products:
    """FLOPs of a forward; a multiplication and an addition are two.

    The backward pass of a product with a weight is two products of the same size, one for the gradient of the weight
    and one for that of its input; each is left out where nothing needs it.

    Attributes:
        weights: of states with weights.
        states: of states with states, as in attention.
        first: of `weights`, those whose input needs no gradient unless something before the module is trainable.
        choices: outside of any gradient: ranking and matching.
        last: of `weights`, the product at the end of a checkpointed layer, which torch does not repeat.
    """

    weights: int = 0
    states: int = 0
    first: int = 0
    choices: int = 0
    last: int = 0

    def __add__(self, other: Products) -> Products:
        return Products(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __mul__(self, times: float) -> Products:
        return Products(**{f.name: round(getattr(self, f.name) * times) for f in fields(self)})

    @property
    def forward(self) -> int:
        """Of one forward."""
        return self.weights + self.states + self.choices

    def backward(self, trainable: bool, input_has_gradient: bool) -> int:
        """Of the backward pass.

        Args:
            trainable: whether the module's own weights are.
            input_has_gradient: whether something before the module is trainable.
        """
        if not trainable and not input_has_gradient:
            return 0
        inputs = self.weights if input_has_gradient else self.weights - self.first
        return 2 * self.states + self.weights * trainable + inputs

    @property
    def repeated(self) -> int:
        """Of what activation checkpointing runs again."""
        return self.weights + self.states - self.last


def linear(tokens: float, width: int, out: int) -> int:
    """FLOPs of a linear layer on `tokens` tokens."""
    return round(2 * tokens * width * out)
