"""`shortv`: image tokens are frozen in some layers (Yuan et al., ICCV 2025, arXiv 2504.00502)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from llava_skip.reduction.method import LayerRows, Option, Reduction
from llava_skip_base.errors import UserError

if TYPE_CHECKING:
    from llava_skip.configuration import LlavaSkipConfig
    from llava_skip.reduction.config import ReductionConfig


class FreezeRule(Reduction):
    """A method that freezes image tokens in some layers: there they ask nothing and take no FFN.

    Their keys and values are still made, and the other tokens attend to them.
    """

    in_decoder = True
    needs_tokens = False

    def frozen(self, reduction: ReductionConfig, layers: int) -> tuple[int, ...]:
        """The layers in which image tokens are frozen, of a decoder with this number of layers.

        Raises:
            UserError: the numbers do not fit the model.
        """
        raise NotImplementedError

    def check(self, reduction: ReductionConfig, config: LlavaSkipConfig) -> None:
        """The layers are in the model."""
        self.frozen(reduction, config.text_config.num_hidden_layers)

    def tokens_for(self, budget: int, config: LlavaSkipConfig) -> int:
        """The number of layers in which the image's tokens must be frozen."""
        layers = config.text_config.num_hidden_layers
        return max(1, min(layers, round(layers * (1 - budget / config.visual_tokens(1)))))

    def layer_rows(self, reduction: ReductionConfig, config: LlavaSkipConfig, crops: int) -> list[LayerRows]:
        """All tokens have keys, values and a place in the cache in every layer."""
        tokens, layers = config.image_length(crops), config.text_config.num_hidden_layers
        frozen = self.frozen(reduction, layers)
        asking = [0 if layer in frozen else tokens for layer in range(layers)]
        return [LayerRows(rows, tokens, rows, tokens) for rows in asking]


class ShortV(FreezeRule):
    """`shortv:8` freezes in 8 layers, `layers` names them.

    The paper takes those in which freezing changes the answer least; `order` is such an order, the least first, of
    which the first are taken. Without it these are the last layers: in the published order for LLaVA-1.5-7B (31 29 30
    28 0 26 27 25 24 22 23 21 2 3 20 18 17 12 19) most of the first ones are.
    """

    name = "shortv"
    options: ClassVar[Mapping[str, Option]] = {"layers": Option(many=True), "order": Option(many=True)}

    def check_numbers(self, reduction: ReductionConfig) -> None:
        """Either a number of layers or their names; an order only with a number; none twice."""
        layers, order = reduction["layers"], reduction["order"]
        if (reduction.tokens is None) == (layers is None):
            raise UserError(f"reduction {reduction}: give a number of layers, as shortv:8, or shortv:layers=31+29+30.")
        if order is not None and (reduction.tokens is None or len(order) < reduction.tokens):
            raise UserError(f"reduction {reduction}: order needs a number of layers, at most its own length.")
        if any(len(set(named)) != len(named) for named in (layers, order) if named is not None):
            raise UserError(f"reduction {reduction}: a layer is named twice.")

    def frozen(self, reduction: ReductionConfig, layers: int) -> tuple[int, ...]:
        """Those that are named, the first of the order, or the last of the model."""
        named = reduction["layers"]
        if named is None:
            order = reduction["order"] or range(layers - 1, -1, -1)
            named = tuple(order[: reduction.count])
        if len(named) > layers or len(named) < (reduction.tokens or 0) or max(named) >= layers:
            raise UserError(f"reduction {reduction}: the language model has {layers} layers, 0 to {layers - 1}.")
        return named
