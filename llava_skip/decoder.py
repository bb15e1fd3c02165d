"""Decoder layers whose FFN runs only on the tokens of a route; weights and names stay those of transformers.

A language model is two classes without code of their own, `Skip<X>DecoderLayer` and `Skip<X>Model`, and a line in
`LANGUAGE_MODELS`; what they do is in `SkippingLayer` and `SkippingModel`. docs/add-a-language-model.md says what must
be true of the model.

Shapes: B batch, T tokens, D width, M tokens that take the FFN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import LlamaModel, MistralModel, PreTrainedConfig, PreTrainedModel, Qwen2Model, Qwen3Model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from llava_skip.configuration import SkipConfig
from llava_skip.masking import OneSequence, attends_in_window
from llava_skip.routing import Route, add_to_tokens, take_tokens
from llava_skip_base.errors import UserError


class SkippingLayer(nn.Module):
    """Placed before a transformers decoder layer: attention on all tokens, the FFN on the tokens of the route.

    With x the hidden states and F the tokens of the route (method, section 5):
    `x = x + Attention(norm1(x))`; `x[F] = x[F] + FFN(norm2(x[F]))`.
    """

    self_attn: Any
    input_layernorm: Any
    post_attention_layernorm: Any
    mlp: Any

    def __call__(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        """Without what stands for no cache."""
        cache = None if isinstance(past_key_values, OneSequence) else past_key_values
        return super().__call__(*args, past_key_values=cache, **kwargs)

    def forward(self, hidden_states: Tensor, route: Route | None = None, **kwargs: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]; without a route, or where it names all tokens, the stock layer.

        A route with a runner leaves to it how many tokens come and go; the last layer of one with `head` gives the
        tokens that reach the head.
        """
        if route is not None and route.runner is not None:
            return route.runner.run(self, hidden_states, kwargs)
        if route is not None and route.head is not None and route.head.layer == self.self_attn.layer_idx:
            return route.head.run(self, hidden_states, kwargs)
        return self.run(hidden_states, None if route is None else route.ffn_tokens_in(self.self_attn.layer_idx), kwargs)

    def run(self, hidden_states: Tensor, tokens: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        """The layer with the FFN on `tokens` [M], flat indices into [B * T]; None: on all, which is the stock layer."""
        if tokens is None:
            return super().forward(hidden_states, **kwargs)
        tokens = tokens.to(hidden_states.device)  # a device map may have put this layer on another one
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        taken = self.post_attention_layernorm(take_tokens(hidden_states, tokens))
        return add_to_tokens(hidden_states, tokens, self.mlp(taken))


class SkippingModel(nn.Module):
    """Placed before a transformers model: its layers are `layer_class`; its `forward` hands `route` on to each of them.

    A plain `nn.Module`, so that whatever transformers reads from a class comes from the stock model.
    """

    layer_class: type[SkippingLayer]
    layers: nn.ModuleList
    post_init: Callable[[], None]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        del self.layers  # freed before the new ones exist: a large model never exists twice
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        # What places a model on several devices finds its layers by the names of their classes.
        self._no_split_modules = {self.layer_class.__name__}
        self.post_init()


class SkipLlamaDecoderLayer(SkippingLayer, LlamaDecoderLayer):
    """A LLaMA decoder layer that skips."""


class SkipLlamaModel(SkippingModel, LlamaModel):
    """transformers' LlamaModel with skipping layers."""

    layer_class = SkipLlamaDecoderLayer


class SkipMistralDecoderLayer(SkippingLayer, MistralDecoderLayer):
    """A Mistral decoder layer that skips."""


class SkipMistralModel(SkippingModel, MistralModel):
    """transformers' MistralModel with skipping layers."""

    layer_class = SkipMistralDecoderLayer


class SkipQwen2DecoderLayer(SkippingLayer, Qwen2DecoderLayer):
    """A Qwen2 decoder layer that skips."""


class SkipQwen2Model(SkippingModel, Qwen2Model):
    """transformers' Qwen2Model with skipping layers."""

    layer_class = SkipQwen2DecoderLayer


class SkipQwen3DecoderLayer(SkippingLayer, Qwen3DecoderLayer):
    """A Qwen3 decoder layer that skips."""


class SkipQwen3Model(SkippingModel, Qwen3Model):
    """transformers' Qwen3Model with skipping layers."""

    layer_class = SkipQwen3DecoderLayer


LANGUAGE_MODELS: dict[str, type[PreTrainedModel]] = {
    "llama": SkipLlamaModel,
    "mistral": SkipMistralModel,
    "qwen2": SkipQwen2Model,
    "qwen3": SkipQwen3Model,
}
"""`model_type` of a language model -> its skipping twin."""


def language_models(model: nn.Module) -> list[Any]:
    """The skipping language models in a model, which may be wrapped."""
    return [module for module in model.modules() if isinstance(module, SkippingModel)]


def build_language_model(config: PreTrainedConfig, skip: SkipConfig | None = None) -> PreTrainedModel:
    """The skipping language model of a text configuration, for the method `skip` (None: dense).

    Raises:
        UserError: the model type has no skipping twin, or its attention does not fit the cache that forgets.
    """
    if config.model_type not in LANGUAGE_MODELS:
        raise UserError(
            f"No skipping decoder for language models of type {config.model_type!r}; "
            f"supported: {', '.join(LANGUAGE_MODELS)}. Their layers are x = x + Attention(norm1(x)), then "
            "x = x + FFN(norm2(x)), so that a token can leave out the FFN alone; layers that run both on the same x "
            "(GPT-NeoX, Phi) or norm what they add are not. docs/add-a-language-model.md says how to add one that is."
        )
    if skip is not None and skip.forget_cache:
        _check_window(config)
    return LANGUAGE_MODELS[config.model_type](config)


def _check_window(config: PreTrainedConfig) -> None:
    """Raise UserError if a layer attends in a window: it would count stored tokens, without the skipped ones."""
    if not attends_in_window(config):
        return
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    seen = f"sliding_window is {window}" + (f", layer_types has {', '.join(sorted(kinds))}" if kinds else "")
    cure = "use_sliding_window to false and layer_types to null" if kinds else "sliding_window to null"
    raise UserError(
        f"The language model ({config.model_type}) attends in a sliding window ({seen}). It counts the tokens that are "
        f"stored, and skip.forget_cache drops some of them: in text_config set {cure}, which changes nothing for "
        "sequences that fit the window, or set skip.forget_cache to false."
    )
