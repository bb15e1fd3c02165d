"""Through the decoder layer by layer, all batches at once: at each layer its own calls, with anything changed.

The model runs once on each batch; hooks note with what each decoder layer is called. From then on the layers are called
one after the other with the noted arguments, so that what is measured is the library's own forward, memory holds the
states of one layer alone, and a change in layer l costs the layers from l on.

Shapes: B batch, T tokens of a sample, D width, V vocabulary, R tokens whose output is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eval.study.analysis.batches import PADDING, Batch
from llava_skip.decoder import SkippingLayer
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip.routing import Route

MOST_LOGITS = 1 << 26
"""Logits that are made at once, so that a large vocabulary fits into memory."""


@dataclass
class Walk:
    """A batch on its way through the layers.

    Attributes:
        batch: on the model's device.
        calls: what each layer is called with, besides the states.
        state: [B, T, D] as it enters the layer that the walk has reached.
        read: [R] flat indices into [B * T] of the tokens whose output is read: the last token of each prompt, and
            the tokens before those of the answers.
        final: [R, D] their states before the head.
    """

    batch: Batch
    calls: list[dict[str, Any]]
    state: Tensor
    read: Tensor
    final: Tensor

    def takes_ffn(self, layer: int) -> Tensor:
        """[B, T] bool, the tokens that take the FFN of a layer; padding never counts."""
        real = self.batch.kinds != PADDING
        route = self.calls[layer].get("route")
        tokens = None if route is None else route.ffn_tokens_in(layer)
        if tokens is None:
            return real
        taken = torch.zeros(real.numel(), dtype=torch.bool, device=real.device)
        return taken.index_fill(0, tokens, True).view_as(real) & real

    def attention_call(self, layer: int) -> dict[str, Any]:
        """What the attention of a layer is called with, besides the normed states."""
        return {name: value for name, value in self.calls[layer].items() if name != "route"}


def decoder_layers(model: LlavaSkipForConditionalGeneration) -> Sequence[SkippingLayer]:
    """The decoder layers of a model."""
    layers: Any = model.model.language_model.layers
    return layers


@torch.no_grad()
def start(model: LlavaSkipForConditionalGeneration, batch: Batch) -> Walk:
    """Run the model on a batch once, and stand before its first layer."""
    calls: list[dict[str, Any]] = []
    states: list[Tensor] = []

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(kwargs)
        state = args[0] if args else given.pop("hidden_states")
        if not states:
            states.append(state)
        calls.append(given)

    with ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
        inputs = batch.inputs_for(model)
        outputs = model.model(**inputs, use_cache=False, return_dict=True)
    moved = batch.to(outputs.last_hidden_state.device)
    read = moved.answers.clone()
    read[torch.arange(len(read), device=read.device), moved.last] = True
    tokens = read.flatten().nonzero().squeeze(1)
    return Walk(moved, calls, states[0], tokens, outputs.last_hidden_state.flatten(0, 1)[tokens])


@torch.no_grad()
def layer_by_layer(
    model: LlavaSkipForConditionalGeneration, batches: Sequence[Batch], title: str
) -> Iterator[tuple[int, SkippingLayer, list[Walk]]]:
    """Each layer with all walks before it; afterwards they go through it.

    Args:
        model: the model.
        batches: the samples.
        title: of the progress bar.
    """
    bar: dict[str, Any] = {"desc": title, "disable": None, "leave": False}
    walks = [start(model, batch) for batch in tqdm(batches, unit="batch", **bar)]
    layers = decoder_layers(model)
    for index, layer in enumerate(tqdm(layers, unit="layer", **bar)):
        yield index, layer, walks
        for walk in walks:
            walk.state = layer(walk.state, **walk.calls[index])


@contextmanager
def _no_attention(layer: SkippingLayer, tokens: Tensor) -> Iterator[None]:
    """Within it, the attention of a layer adds nothing to `tokens` [B, T]; others still attend to them."""

    def drop(module: nn.Module, args: Any, output: Any) -> Any:
        return output[0].masked_fill(tokens.unsqueeze(-1), 0), *output[1:]

    with layer.self_attn.register_forward_hook(drop):
        yield


@torch.no_grad()
def finish_changed(
    model: LlavaSkipForConditionalGeneration, walk: Walk, index: int, tokens: Tensor, *, ffn: bool, attention: bool
) -> Tensor:
    """The states [R, D] before the head, of the tokens that are read, with one layer changed.

    Args:
        model: the model.
        walk: a batch before that layer.
        index: the layer.
        tokens: [B, T] bool, the tokens that the change is for.
        ffn: whether they skip the layer's FFN.
        attention: whether its attention adds nothing to them. Their keys and values, made from the states that enter
            the layer, are there for the other tokens in any case.
    """
    layers, call = decoder_layers(model), walk.calls[index]
    if ffn:
        taken = (walk.takes_ffn(index) & ~tokens).flatten().nonzero().squeeze(1)
        call = {**call, "route": replace(call.get("route") or Route(), ffn_tokens=taken, layers=None)}
    with ExitStack() as stack:
        if attention:
            stack.enter_context(_no_attention(layers[index], tokens))
        state = layers[index](walk.state, **call)
    for layer, later in zip(layers[index + 1 :], walk.calls[index + 1 :], strict=True):
        state = layer(state, **later)
    return model.model.language_model.norm(state.flatten(0, 1)[walk.read])


@torch.no_grad()
def divergence(
    model: LlavaSkipForConditionalGeneration, full: Tensor, changed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """How far two distributions of the next token are apart, from states before the head [R, D] each.

    Returns:
        KL(full || changed) [R] and KL(changed || full) [R] in nats; whether the likeliest token differs [R].
    """
    rows = max(1, MOST_LOGITS // model.config.text_config.vocab_size)
    forward, backward, flipped = [], [], []
    for one, other in zip(full.split(rows), changed.split(rows), strict=True):
        p, q = (model.lm_head(states).float().log_softmax(dim=-1) for states in (one, other))
        forward.append((p.exp() * (p - q)).sum(dim=-1))
        backward.append((q.exp() * (q - p)).sum(dim=-1))
        flipped.append(p.argmax(dim=-1) != q.argmax(dim=-1))
    return torch.cat(forward), torch.cat(backward), torch.cat(flipped)
