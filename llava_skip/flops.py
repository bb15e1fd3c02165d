"""What a model costs, from its configuration alone: FLOPs of the decoder, tokens and bytes of the cache.

A multiplication and an addition count as two FLOPs. Counted are the matrix products, as torch's FlopCounterMode does:
projections, attention (every token with every key, since a causal kernel is counted whole), FFN and head; norms,
activations and the rotary embedding are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from llava_skip.configuration import LlavaSkipConfig


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
) -> DecoderFlops:
    """FLOPs of a forward through all layers and the head.

    Args:
        text: the language model's configuration.
        tokens: tokens of a sample that attend, T (padding included).
        ffn_tokens: tokens of the whole batch that take the FFN, averaged over the layers.
        head_tokens: tokens of the whole batch that reach the head.
        samples: B.
        keys: keys that each token is multiplied with; default T, a prefill.
    """
    width, layers = text.hidden_size, text.num_hidden_layers
    head_width = getattr(text, "head_dim", None) or width // text.num_attention_heads
    queries, key_values = text.num_attention_heads * head_width, text.num_key_value_heads * head_width
    return DecoderFlops(
        projections=layers * 2 * samples * tokens * width * (2 * queries + 2 * key_values),
        attention=layers * 2 * 2 * samples * tokens * (tokens if keys is None else keys) * queries,
        ffn=round(layers * ffn_tokens) * 2 * 3 * width * text.intermediate_size,
        head=2 * head_tokens * width * text.vocab_size,
    )


@dataclass(frozen=True)
class ImageCost:
    """What one image costs in the language model.

    Attributes:
        tokens: tokens that attend in the prefill.
        ffn_tokens: tokens of them that take the FFN, averaged over the layers.
        cache_tokens: tokens that stay in the cache of each layer.
        cache_bytes: bytes of these in all layers, in bfloat16.
        prefill_flops: FLOPs of a prefill of the image and `text_tokens` tokens of text, head on the last token.
    """

    tokens: int
    ffn_tokens: float
    cache_tokens: int
    cache_bytes: int
    prefill_flops: int


def image_cost(config: LlavaSkipConfig, text_tokens: int = 100) -> ImageCost:
    """The cost of an image under a configuration, with `text_tokens` tokens of text."""
    skip, text = config.skip_config, config.text_config
    tokens = config.image_seq_length
    ffn_tokens = tokens if skip is None else tokens - skip.mean_num_skipping(text.num_hidden_layers)
    cache_tokens = skip.num_kept if skip is not None and skip.forget_cache else tokens
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token_bytes = 2 * text.num_key_value_heads * head_width * torch.bfloat16.itemsize
    return ImageCost(
        tokens=tokens,
        ffn_tokens=ffn_tokens,
        cache_tokens=cache_tokens,
        cache_bytes=text.num_hidden_layers * cache_tokens * token_bytes,
        prefill_flops=decoder_flops(text, tokens + text_tokens, ffn_tokens + text_tokens, head_tokens=1).total,
    )
