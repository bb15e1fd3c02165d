"""Attention over samples that lie one after the other in one row: each by itself, without a mask.

transformers separates such samples by a mask of all tokens by all tokens, but for flash and flex attention. Here
torch's causal kernel runs once for each sample, so that work and memory are those of the samples.

Shapes: B batch, T tokens of the row, H heads, E head width.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from llava_skip.counts import TokenCounts, lengths_in_row
from llava_skip.decoder import language_models
from llava_skip.head_rows import OF_PACKED, SEQUENCE_LENGTHS
from llava_skip.masking import attends_in_window

PER_SAMPLE = "sdpa_per_sample"
"""Name of the attention implementation; without several samples in a row it is sdpa."""


def attend_per_sample(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query, key and value [B, H, T, E] -> [B, T, H, E].

    Args:
        module: the attention layer.
        query: of all tokens.
        key: of all tokens.
        value: of all tokens.
        attention_mask: where there is one, it separates the samples.
        sequence_lengths: tokens of each sample, T together; None: the row is one sample.
        **kwargs: as those of sdpa.
    """
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if sequence_lengths is None or attention_mask is not None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    samples = zip(*(states.split(sequence_lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([attend(module, *sample, None, **kwargs)[0] for sample in samples], dim=1), None


AttentionInterface.register(PER_SAMPLE, attend_per_sample)
AttentionMaskInterface.register(PER_SAMPLE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def set_attention_per_sample(model: nn.Module) -> None:
    """Have the language model of a model attend to each sample of a row by itself, where nothing else needs a mask."""
    for language_model in language_models(model):
        language_model.set_attn_implementation(PER_SAMPLE)


def arguments_of_row(
    config: PreTrainedConfig,
    batch: int,
    mask: Any,
    cache: Cache | None,
    position_ids: Tensor | None,
    counts: TokenCounts | None,
) -> dict[str, Any]:
    """What tells the layers where the samples of a forward's row begin; empty where a mask does, or transformers.

    Flash attention gets it in transformers' names; without them each layer would read the positions from the device.

    Args:
        config: of the language model.
        batch: B; a row is a batch of one.
        mask: of the forward, as its layers get it.
        cache: what is stored already.
        position_ids: [B, T]; where they start again, another sample begins.
        counts: of the batch; if the host does not know the lengths, the device is read.
    """
    is_row = batch == 1 and mask is None and cache is None and position_ids is not None
    if not is_row or torch.compiler.is_exporting():  # a graph cannot depend on values
        return {}
    assert position_ids is not None
    flash = is_flash_attention_requested(config)
    if not flash and (config._attn_implementation != PER_SAMPLE or attends_in_window(config)):
        return {}
    lengths = (counts.sequences if counts is not None else ()) or lengths_in_row(position_ids)
    if not flash:
        return {SEQUENCE_LENGTHS: lengths}
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(position_ids.device, non_blocking=True)
    longest = max(lengths)
    return dict(zip(OF_PACKED, (starts, starts, longest, longest), strict=True))
