"""What a model costs, from its configuration alone: FLOPs of the decoder, tokens and bytes of the cache.

A multiplication and an addition count as two FLOPs. Counted are the matrix products, as torch's FlopCounterMode does:
projections, attention (every token with every key, since a causal kernel is counted whole), FFN and head; norms,
activations and the rotary embedding are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.reduction.method import LayerRows


@dataclass(frozen=True)
class DecoderFlops:
    """FLOPs of one forward of the language model, by where they are spent."""

    projections: int
    attention: int
    ffn: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.projections + self.attention + self.ffn + self.head


def decoder_flops(
    text: PreTrainedConfig,
    tokens: float,
    ffn_tokens: float,
    head_tokens: int,
    samples: int = 1,
    keys: float | None = None,
    asking: float | None = None,
    last_ffn_tokens: float | None = None,
) -> DecoderFlops:
    """FLOPs of a forward through all layers and the head.

    The last two arguments are for a forward of which the head reads some tokens, see `llava_skip.head_rows`.

    Args:
        text: the language model's configuration.
        tokens: tokens of a sample that attend, T (padding included).
        ffn_tokens: tokens of the whole batch that take the FFN, averaged over the layers; without the last one if that
            has its own number.
        head_tokens: tokens of the whole batch that reach the head.
        samples: B.
        keys: keys that each token is multiplied with; default T, a prefill.
        asking: tokens of a sample that have a query in the last layer; default T.
        last_ffn_tokens: tokens of the whole batch that take the last layer's FFN; default as in the others.
    """
    width, layers = text.hidden_size, text.num_hidden_layers
    queries, key_values = head_widths(text)
    keys = tokens if keys is None else keys
    asking = (layers - 1) * tokens + (tokens if asking is None else asking)  # in all layers
    ffn_tokens = (layers - 1) * ffn_tokens + (ffn_tokens if last_ffn_tokens is None else last_ffn_tokens)
    return DecoderFlops(
        projections=2 * samples * width * (asking * 2 * queries + layers * tokens * 2 * key_values),
        attention=round(2 * 2 * samples * asking * keys * queries),
        ffn=round(ffn_tokens) * 2 * 3 * width * text.intermediate_size,
        head=2 * head_tokens * width * text.vocab_size,
    )


def head_widths(text: PreTrainedConfig) -> tuple[int, int]:
    """Widths of all queries and of all keys of a token."""
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_attention_heads * head_width, text.num_key_value_heads * head_width


def prefill_flops(text: PreTrainedConfig, layers: Sequence[LayerRows], text_tokens: int, head_tokens: int = 1) -> int:
    """FLOPs of a prefill of a sample whose image has other tokens in each layer, and of its text.

    Tokens that ask have a query and an output projection, tokens that are asked a key and a value. In the last layer
    only those that reach the head ask and take the FFN (`llava_skip.head_rows`).

    Args:
        text: the language model's configuration.
        layers: the image's tokens in each layer.
        text_tokens: tokens beside the image's, in every layer.
        head_tokens: tokens that reach the head.
    """
    width, (query_width, key_width), total = text.hidden_size, head_widths(text), 0
    for number, rows in enumerate(layers, 1):
        queries, keys, ffn = (count + text_tokens for count in (rows.queries, rows.keys, rows.ffn))
        if number == len(layers):
            queries, ffn = min(queries, head_tokens), min(ffn, head_tokens)
        total += 2 * 2 * width * (queries * query_width + keys * key_width)  # projections
        total += 2 * 2 * queries * keys * query_width
        total += 2 * 3 * ffn * width * text.intermediate_size
    return total + 2 * head_tokens * width * text.vocab_size


def image_rows(config: LlavaSkipConfig, crops: int | None = None) -> list[LayerRows]:
    """For each decoder layer the tokens of an image with `crops` crops; default: the most that it can have.

    They are those of a forward of which all tokens are read.
    """
    crops, layers = crops or config.most_crops, config.text_config.num_hidden_layers
    if (reduction := config.reduction_config) is not None:
        return reduction.rule.layer_rows(reduction, config, crops)
    tokens, skip = config.image_length(crops), config.skip_config
    if skip is None:
        return [LayerRows(tokens, tokens, tokens, tokens)] * layers
    kept = skip.num_kept if skip.forget_cache else tokens
    skips = [skip.layers is None or layer in skip.layers for layer in range(layers)]
    return [LayerRows(tokens, tokens, skip.num_kept if skipping else tokens, kept) for skipping in skips]


@dataclass(frozen=True)
class ImageCost:
    """What one image costs in the language model; what is a mean is one over its layers.

    Attributes:
        tokens: tokens that enter it.
        attention_tokens: mean number of tokens that attend in the prefill.
        ffn_tokens: mean number of tokens that take the FFN.
        cache_tokens: mean number of tokens that stay in the cache.
        cache_bytes: bytes of these in all layers, in bfloat16.
        prefill_flops: FLOPs of a prefill of the image and `text_tokens` tokens of text, head on the last token.
    """

    tokens: int
    attention_tokens: float
    ffn_tokens: float
    cache_tokens: float
    cache_bytes: int
    prefill_flops: int


def image_cost(config: LlavaSkipConfig, text_tokens: int = 100) -> ImageCost:
    """The cost of an image, with the most crops that it can have, and of `text_tokens` tokens of text."""
    if config.reduction is not None:
        return _reduced_cost(config, text_tokens)
    skip, text = config.skip_config, config.text_config
    tokens = config.image_seq_length
    ffn_tokens = tokens if skip is None else tokens - skip.mean_num_skipping(text.num_hidden_layers)
    cache_tokens = skip.num_kept if skip is not None and skip.forget_cache else tokens
    token_bytes = 2 * head_widths(text)[1] * torch.bfloat16.itemsize
    return ImageCost(
        tokens=tokens,
        attention_tokens=tokens,
        ffn_tokens=ffn_tokens,
        cache_tokens=cache_tokens,
        cache_bytes=text.num_hidden_layers * cache_tokens * token_bytes,
        prefill_flops=prefill_flops(text, image_rows(config), text_tokens),
    )


def _reduced_cost(config: LlavaSkipConfig, text_tokens: int) -> ImageCost:
    """That of a rival method, which may have other tokens in each layer."""
    reduction, text = config.reduction_config, config.text_config
    assert reduction is not None  # the caller has looked
    layers = reduction.rule.layer_rows(reduction, config, config.most_crops)
    queries, cached = (sum(getattr(rows, name) for rows in layers) for name in ("queries", "cache"))
    return ImageCost(
        tokens=config.image_seq_length,
        attention_tokens=_mean(queries, len(layers)),
        ffn_tokens=_mean(sum(rows.ffn for rows in layers), len(layers)),
        cache_tokens=_mean(cached, len(layers)),
        cache_bytes=cached * 2 * head_widths(text)[1] * torch.bfloat16.itemsize,
        prefill_flops=prefill_flops(text, layers, text_tokens)
        + reduction.rule.extra_flops(reduction, config, config.most_crops, text_tokens),
    )


def _mean(total: int, count: int) -> float:
    """A mean; a whole number stays one."""
    return total / count if total % count else total // count
