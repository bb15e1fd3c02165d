"""The last decoder layer for the tokens that reach the head alone: nobody reads what it gives the others.

Keys and values are made of all tokens. In a prefill, queries, output projection and FFN are those of the last token
alone. In training the FFN is that of the supervised tokens alone; queries and output projection begin at the first of
them where the forward has a mask that is a tensor of four dimensions, and are those of all tokens elsewhere.

Shapes: B batch, T new tokens of a sample, R those from the first one on that reaches the head, M tokens that reach the
head, K tokens that a layer has stored, H key-value heads, E head width, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.models.llama import modeling_llama
from transformers.utils.generic import is_flash_attention_requested

from llava_skip.configuration import LlavaSkipConfig

if TYPE_CHECKING:
    from llava_skip.counts import TokenCounts
    from llava_skip.decoder import SkippingLayer

OF_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Arguments of transformers for several samples in one row under flash attention: their starts, the longest length."""
SEQUENCE_LENGTHS = "sequence_lengths"
"""Argument of a layer: tokens of each sample, where several lie in one row and no mask separates them."""
READ_BY_USERS = ("output_hidden_states", "output_attentions")
"""Arguments and settings that ask for what all layers give all tokens."""


@dataclass(frozen=True)
class HeadRows:
    """The tokens of a forward that reach the head, in its last decoder layer.

    Attributes:
        layer: index of the last decoder layer.
        number: R, so many tokens at the end of each sample have all that reach the head; None: the supervised tokens
            reach it, and `counted` says how many these are.
        tokens: [M] flat indices into [B * T] of those that do; None: all of the R.
        stay: [B, T] bool, tokens whose FFN this layer leaves out: skipped ones and padding; None if there are none.
        gone: [M], or [B, R] without `tokens`, bool, those that were dropped before this layer and get zeros; None if
            there are none.
    """

    layer: int
    number: Any
    tokens: Tensor | None = None
    stay: Tensor | None = None
    gone: Tensor | None = None

    def counted(self, counts: TokenCounts | None, supervised: Tensor | None) -> HeadRows | None:
        """Complete: with the `supervised` tokens [M], flat indices, if they reach the head; None if nobody counted."""
        if self.number is not None:
            return self
        if counts is None:
            return None
        # At least one, so that the same modules are called in the same order where nothing is supervised.
        number = counts.shape[1] - counts.first if counts.supervised else 1
        return replace(self, number=number, tokens=supervised)

    def run(self, layer: SkippingLayer, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The last layer, [B, T, D] -> [B, R, D]; [1, M, D] where `tokens` names them."""
        first = hidden_states.shape[1] - self.number
        states = self._attend(layer, hidden_states, arguments, first)
        if self.tokens is not None:
            tokens = self.tokens.to(states.device)
            tokens = tokens - first * (tokens // hidden_states.shape[1] + 1)  # among the R of each sample
            states = states.flatten(0, 1).index_select(0, tokens).unsqueeze(0)
        update = layer.mlp(layer.post_attention_layernorm(states))
        if self.stay is not None:
            update = update.masked_fill(self.take(self.stay.unsqueeze(-1).to(states.device)), 0)
        states = states + update
        if self.gone is not None:
            states = states.masked_fill(self.gone.to(states.device).view(*states.shape[:2], 1), 0)
        return states

    def take(self, values: Tensor) -> Tensor:
        """Of values of all tokens, [B, T, ...], those that `run` gives: [B, R, ...] or [1, M, ...]."""
        if self.tokens is None:
            return values[:, values.shape[1] - self.number :]
        return values.flatten(0, 1).index_select(0, self.tokens.to(values.device)).unsqueeze(0)

    def _attend(self, layer: SkippingLayer, hidden_states: Tensor, arguments: dict[str, Any], first: Any) -> Tensor:
        """The last R tokens after attention, [B, R, D]."""
        normed, mask = layer.input_layernorm(hidden_states), arguments.get("attention_mask")
        if arguments.get("attention_instances") is not None or not (mask is None or isinstance(mask, Tensor)):
            attended, _ = layer.self_attn(hidden_states=normed, **arguments)
            return hidden_states[:, first:] + attended[:, first:]
        # On another rank with another mask the same modules must be called in the same order, which ZeRO's collective
        # calls follow: so keys and values of the tokens that ask nothing are made by themselves even if there are none.
        alone = self._ask_alone(layer.self_attn.config, mask, arguments)
        length, begin = normed.shape[1], first if alone else 0
        # Each part in one piece of memory, which its products share; of views each would make a copy of its own.
        silent, normed = normed[:, :begin].contiguous(), normed[:, begin:].contiguous()
        tables, cache = arguments["position_embeddings"], arguments.get("past_key_values")
        flash = is_flash_attention_requested(layer.self_attn.config)
        most = length if alone and mask is None and not flash else None
        changed: dict[str, Any] = {"past_key_values": _KeysBefore(layer.self_attn, silent, tables, cache, most)}
        if alone:
            if mask is not None and mask.ndim == 4 and mask.shape[2] == length:
                mask = mask[:, :, begin:]
            changed |= {
                "attention_mask": mask,
                "position_embeddings": tuple(table[:, begin:] for table in tables),
                "position_ids": None,
            }
        attended, _ = layer.self_attn(hidden_states=normed, **arguments | changed)
        return hidden_states[:, first:] + attended[:, first - begin :]

    def _ask_alone(self, config: PreTrainedConfig, mask: Tensor | None, arguments: dict[str, Any]) -> bool:
        """Whether the R tokens can ask without the others, and without a mask that would be made for it.

        One query sees all keys. Several do without a mask only in a kernel that aligns them with the last keys, and
        torch's aligns them with the first. Flash attention may find several sequences in one where nothing is padded.
        In training an attention without a mask may share a sequence between processes, and needs the queries of all.
        Where attention is made for each sample by itself, all tokens ask.
        """
        if mask is not None and mask.ndim == 4:
            return True
        if self.tokens is not None:
            return False
        if is_flash_attention_requested(config):
            is_one = mask is not None or arguments.get("past_key_values") is not None
            return self.number == 1 and is_one and arguments.get("cu_seq_lens_q") is None
        return self.number == 1 and mask is None and arguments.get(SEQUENCE_LENGTHS) is None


class _KeysBefore:
    """Stands in for the cache of a layer: puts keys and values of tokens that ask nothing before those of the others.

    An empty static cache gives its whole room, and no mask stands for the causal one. Where all tokens ask, its form
    hides the rest; here `most`, the number of their keys, does. A cache that grows gives what it has, and may have
    tokens of earlier forwards where there is no mask.
    """

    def __init__(
        self, attention: Any, normed: Tensor, tables: tuple[Tensor, ...], cache: Cache | None, most: int | None
    ) -> None:
        length = normed.shape[1]
        self.keys, self.values = keys_and_values(attention, normed, tuple(table[:, :length] for table in tables))
        self.cache, self.most = cache, most

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, R, E] of those that ask -> those of all."""
        keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        if self.cache is None:
            return keys, values
        keys, values = self.cache.update(keys, values, layer_idx, *args, **kwargs)
        most = self.most if self.cache.layers[layer_idx].is_compileable else None
        return keys[:, :, :most], values[:, :, :most]


def keys_and_values(attention: Any, normed: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Keys with positions and values [B, H, T, E] of tokens that ask nothing.

    Args:
        attention: of a decoder layer.
        normed: [B, T, D], what it would get.
        tables: cosine and sine, [B or 1, T, E].
    """
    heads = -1, attention.head_dim
    keys = attention.k_proj(normed).unflatten(-1, heads)
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    keys = keys.transpose(1, 2)
    # A query that nobody reads, of its own: a kernel in place of this function may write into what it gets.
    _, keys = modeling_llama.apply_rotary_pos_emb(torch.zeros_like(keys[:, :1]), keys, *tables)
    return keys, attention.v_proj(normed).unflatten(-1, heads).transpose(1, 2)


def rows_for_head(
    config: LlavaSkipConfig,
    language_model: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    supervised: Tensor | None,
    training: bool,
    logits_to_keep: int | Tensor | None,
    arguments: dict[str, Any],
) -> HeadRows | None:
    """What the last layer computes in a forward whose states go to the head; None: all tokens.

    Args:
        config: of the model.
        language_model: its decoder.
        input_ids: [B, T].
        inputs_embeds: [B, T, D]; one of both is given.
        supervised: [B, T] bool, the tokens whose next one has a label; None without labels.
        training: whether the loss alone is read, unless `logits_to_keep` asks for logits.
        logits_to_keep: of the forward.
        arguments: those that are handed on to the language model.
    """
    text, reduction = config.text_config, config.reduction_config
    # The number of tokens that an exported graph takes must not be bound by what the last layer leaves out.
    if torch.compiler.is_exporting() or any(_is_asked(name, arguments, text) for name in READ_BY_USERS):
        return None
    last, new = _last_layer(language_model), _length(input_ids, inputs_embeds)
    if supervised is None:
        # Behind a cut the last tokens of a sample may be others than those of the forward, but for the very last one.
        most = 2 if reduction is not None and reduction.rule.in_decoder else new
        some = isinstance(logits_to_keep, int) and 0 < logits_to_keep < min(most, new)
        return HeadRows(last, logits_to_keep) if some else None
    if not training or logits_to_keep is not None:
        return None
    return HeadRows(last, None)


def _last_layer(language_model: Any) -> int:
    """Index of the last layer that runs; some may have been taken off behind it."""
    layers = language_model.layers
    return layers[min(len(layers), language_model.config.num_hidden_layers) - 1].self_attn.layer_idx


def _length(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Any:
    given = inputs_embeds if input_ids is None else input_ids
    return 0 if given is None else given.shape[1]


def _is_asked(name: str, arguments: dict[str, Any], text: PreTrainedConfig) -> bool:
    given = arguments.get(name)
    return bool(getattr(text, name, False) if given is None else given)
