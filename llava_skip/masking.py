"""The attention mask under which text does not see skipped tokens.

Shapes: B batch, T new rows of a sample, K stored rows.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_causal_mask

from llava_skip.configuration import SkipConfig
from llava_skip.routing import hidden_from


def mask_skipped(
    config: PreTrainedConfig,
    skip: SkipConfig,
    inputs_embeds: Tensor,
    mask: Tensor | None,
    cache: Cache | None,
    is_image: Tensor,
    skipped: Tensor,
) -> Tensor:
    """The causal mask of a prefill in which only a picture's own rows see its skipped rows.

    Args:
        config: of the language model; its attention implementation decides the form of the mask.
        skip: the sizes of a picture's block.
        inputs_embeds: [B, T, D], the new rows.
        mask: [B, K + T], False or 0 on padding; None if nothing is padded.
        cache: what is stored already, never a skipped row.
        is_image: [B, T] bool, the placeholders.
        skipped: [B, T] bool, the rows that skip.

    Raises:
        ValueError: the attention implementation takes no mask.
    """
    if "flash" in (config._attn_implementation or ""):
        raise ValueError(
            f"skip.text_sees_skipped is false, which needs a mask, and {config._attn_implementation} takes none: "
            "set attn_implementation to sdpa, eager or flex_attention."
        )
    stored = 0 if cache is None else cache.get_query_offset()
    viewer, owner = (nn.functional.pad(numbers, (stored, 0)) for numbers in hidden_from(is_image, skipped, skip))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (owner[batch, key] == 0) | (owner[batch, key] == viewer[batch, query])

    return create_causal_mask(config, inputs_embeds, mask, cache, and_mask_function=visible)
