"""Decoder layers whose FFN runs only on the rows of a route; weights and names stay those of transformers.

Shapes: B batch, T rows, D width, M rows that take the FFN.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlamaModel, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llava_skip.routing import Route, add_rows, take_rows


class SkipLlamaDecoderLayer(LlamaDecoderLayer):
    """A LLaMA decoder layer: attention on all rows, the FFN on the rows of the route.

    With x the rows and F those of the route (method, section 5):
    `x = x + Attention(norm1(x))`; `x[F] = x[F] + FFN(norm2(x[F]))`.
    """

    def forward(self, hidden_states: Tensor, route: Route | None = None, **kwargs: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]; without a route, or where it names all rows, the stock layer."""
        rows = None if route is None else route.rows_in(self.self_attn.layer_idx)
        if rows is None:
            return super().forward(hidden_states, **kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        taken = self.post_attention_layernorm(take_rows(hidden_states, rows))
        return add_rows(hidden_states, rows, self.mlp(taken))


class SkipLlamaModel(LlamaModel):
    """transformers' LlamaModel with skipping layers; its `forward` hands `route` on to each of them."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        del self._modules["layers"]  # freed before the new ones exist: a large model is never held twice
        self.layers = nn.ModuleList(SkipLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


LANGUAGE_MODELS: dict[str, type[PreTrainedModel]] = {"llama": SkipLlamaModel}
"""`model_type` of a language model -> its skipping twin."""


def build_language_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The skipping language model of a text configuration.

    Raises:
        ValueError: the model type has no skipping twin.
    """
    if config.model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"No skipping decoder for language models of type {config.model_type!r}; "
            f"supported: {', '.join(LANGUAGE_MODELS)}."
        )
    return LANGUAGE_MODELS[config.model_type](config)
