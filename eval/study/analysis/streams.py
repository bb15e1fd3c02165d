"""The same tokens twice through one decoder: with skipping and without, side by side in one batch.

Shapes: B samples, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils.generic import is_flash_attention_requested

from llava_skip.routing import Route, skipped_tokens
from llava_skip_base.errors import UserError

MOST_LOGITS = 1 << 26
"""Logits that are made at once, so that a large vocabulary fits into memory."""
LayerHook = Callable[[int, Any, Tensor, dict[str, Any], Tensor], None]
"""Called after a decoder layer: its index, the layer, its input [2B, T, D], its other arguments, its output."""


@dataclass(frozen=True)
class Kinds:
    """Tokens of a batch, [B, T] bool each.

    Attributes:
        real: not padding.
        skipped: these skip the FFN in the first of the two runs. Of a skipping model, those that it skips; of a dense
            one, all image tokens.
        behind: after the first skipped token of their sample, and not skipped: the tokens that skipping can change.
        text: those of `behind` that are no image tokens.
        last: the last token of each prompt.
        answers: those whose next token belongs to an answer of the data.
    """

    real: Tensor
    skipped: Tensor
    behind: Tensor
    text: Tensor
    last: Tensor
    answers: Tensor

    @classmethod
    def of(cls, model: Any, inputs: Mapping[str, Tensor]) -> Kinds:
        """Of what the processor gives for a batch of prompts, and `last` and `answers` where answers follow them."""
        image, skip = model.model.find_images(inputs["input_ids"], None), model.config.skip_config
        mask, last, answers = (inputs.get(name) for name in ("attention_mask", "last", "answers"))
        real = torch.ones_like(image) if mask is None else mask.bool()
        skipped = image if skip is None else skipped_tokens(image, skip)
        behind = real & ~skipped & (skipped.cumsum(dim=1) > 0)
        positions = torch.arange(real.shape[1], device=real.device)
        last = (real * positions).argmax(dim=1) if last is None else last.to(real.device)
        answers = torch.zeros_like(real) if answers is None else answers.to(real.device)
        return cls(real, skipped, behind, behind & ~image, positions == last[:, None], answers)


@torch.no_grad()
def run_both(model: Any, inputs: Mapping[str, Tensor], kinds: Kinds, hook: LayerHook) -> Tensor:
    """One forward over [2B, T]: samples 0 to B-1 with skipping, B to 2B-1 without.

    Weights, tokens, positions and masks are the same for both; only the route differs. Use `plain_attention` around it
    if `hook` differentiates.

    Returns:
        [2B, T, D], the states before the head.
    """
    skip = model.config.skip_config
    ffn = torch.cat([kinds.real & ~kinds.skipped, kinds.real]).flatten().nonzero().squeeze(1)
    route = Route(ffn_tokens=ffn, layers=None if skip is None else skip.layers)

    def double(module: Any, args: tuple, arguments: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        names = ("inputs_embeds", "attention_mask", "position_ids")
        given = {name: arguments[name] for name in names if arguments.get(name) is not None}
        return args, arguments | {name: torch.cat([value, value]) for name, value in given.items()} | {"route": route}

    language_model = model.model.language_model
    handles = [language_model.register_forward_pre_hook(double, with_kwargs=True)]
    for number, layer in enumerate(language_model.layers):

        def after(module: Any, args: tuple, arguments: dict[str, Any], output: Tensor, number: int = number) -> None:
            hook(number, module, args[0], {n: v for n, v in arguments.items() if n != "route"}, output)

        handles.append(layer.register_forward_hook(after, with_kwargs=True))
    try:
        names = ("input_ids", "attention_mask", "pixel_values", "crop_counts", "position_ids")
        given = {name: inputs[name] for name in names if inputs.get(name) is not None}
        return model.model(**given, use_cache=False, return_dict=True).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def divergence(model: Any, states: Tensor, read: Tensor) -> Tensor:
    """KL(without skipping || with skipping) in nats of what follows the tokens `read` [B, T], in their order.

    `states` [2B, T, D] are those of `run_both`.
    """
    pairs = [half[read.to(states.device)] for half in states.chunk(2)]
    rows = max(1, MOST_LOGITS // model.config.text_config.vocab_size)
    found = []
    for x, y in zip(*(half.split(rows) for half in pairs), strict=True):
        p, q = (model.lm_head(part).double().log_softmax(dim=-1) for part in (y, x))
        found.append((p.exp() * (p - q)).sum(dim=-1).cpu())
    return torch.cat(found)


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Within it attention is computed as plain products: torch's fused kernels have no forward derivative.

    Raises:
        UserError: the model uses flash attention, which has none either.
    """
    if is_flash_attention_requested(model.model.language_model.config):
        raise UserError(
            "The bounds need derivatives of attention, and flash attention has no forward ones: load the model with "
            "attn_implementation sdpa or eager."
        )
    with sdpa_kernel(SDPBackend.MATH):
        yield
