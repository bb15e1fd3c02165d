"""What a model costs, from its configuration alone: FLOPs of the decoder, rows and bytes of the cache.

A multiplication and an addition count as two FLOPs. Counted are the matrix products, as torch's FlopCounterMode does:
projections, attention (every row with every key, since a causal kernel is counted whole), FFN and head; norms,
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
    text: PreTrainedConfig, rows: int, ffn_rows: float, head_rows: int, samples: int = 1, keys: int | None = None
) -> DecoderFlops:
    """FLOPs of a forward through all layers and the head.

    Args:
        text: the language model's configuration.
        rows: rows of a sample that attend, T (padding included).
        ffn_rows: rows of the whole batch that take the FFN, averaged over the layers.
        head_rows: rows of the whole batch that reach the head.
        samples: B.
        keys: keys that each row is multiplied with; default T, a prefill.
    """
    width, layers = text.hidden_size, text.num_hidden_layers
    head_width = getattr(text, "head_dim", None) or width // text.num_attention_heads
    queries, key_values = text.num_attention_heads * head_width, text.num_key_value_heads * head_width
    return DecoderFlops(
        projections=layers * 2 * samples * rows * width * (2 * queries + 2 * key_values),
        attention=layers * 2 * 2 * samples * rows * (rows if keys is None else keys) * queries,
        ffn=round(layers * ffn_rows) * 2 * 3 * width * text.intermediate_size,
        head=2 * head_rows * width * text.vocab_size,
    )


@dataclass(frozen=True)
class ImageCost:
    """What one picture costs in the language model.

    Attributes:
        rows: rows that attend in the prefill.
        ffn_rows: rows of them that take the FFN, averaged over the layers.
        cache_rows: rows that stay in the cache of each layer.
        cache_bytes: bytes of these in all layers, in bfloat16.
        prefill_flops: FLOPs of a prefill of the picture and `text_rows` rows of text, head on the last row.
    """

    rows: int
    ffn_rows: float
    cache_rows: int
    cache_bytes: int
    prefill_flops: int


def image_cost(config: LlavaSkipConfig, text_rows: int = 100) -> ImageCost:
    """The cost of a picture under a configuration, beside `text_rows` rows of text."""
    skip, text = config.skip_config, config.text_config
    rows = config.image_seq_length
    ffn_rows = rows if skip is None else rows - skip.mean_num_skipping(text.num_hidden_layers)
    cache_rows = skip.num_kept if skip is not None and skip.forget_cache else rows
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    row_bytes = 2 * text.num_key_value_heads * head_width * torch.bfloat16.itemsize
    return ImageCost(
        rows=rows,
        ffn_rows=ffn_rows,
        cache_rows=cache_rows,
        cache_bytes=text.num_hidden_layers * cache_rows * row_bytes,
        prefill_flops=decoder_flops(text, rows + text_rows, ffn_rows + text_rows, head_rows=1).total,
    )
