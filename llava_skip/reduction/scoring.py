"""What decides a cut: attention of the few tokens that ask, computed on its own, so that no attention map is made.

Shapes: B batch, N tokens of a stage, K tokens that a layer has stored, Q asking tokens, H heads, E head width, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava_skip.reduction.in_decoder import Cut, keep_best
from llava_skip.routing import align_right
from llava_skip_base.errors import UserError

if TYPE_CHECKING:
    from llava_skip.decoder import SkippingLayer
    from llava_skip.reduction.stages import Stage


@dataclass(frozen=True)
class CutView:
    """What a method decides a cut by.

    Attributes:
        layer: the decoder layer whose attention is asked.
        inputs: [B, N, D], its hidden states.
        outputs: [B, N, D], what it gave; None if it has not run.
        keys: [B, key-value heads, K + N, E], all its keys, with positions.
        stored: [B, K] bool, which of the stored ones are real; None if all are.
        embeddings: cosine and sine, [B or 1, N, E].
        stage: the tokens.
        asking: [B, N] bool.
        stays: [B, N] bool, image tokens that are kept whatever attends to them, since their output is needed.
        num_images: [B], image tokens that a sample began with.
    """

    layer: SkippingLayer
    inputs: Tensor
    outputs: Tensor | None
    keys: Tensor
    stored: Tensor | None
    embeddings: tuple[Tensor, Tensor]
    stage: Stage
    asking: Tensor
    stays: Tensor
    num_images: Tensor

    @property
    def is_image(self) -> Tensor:
        """[B, N] bool."""
        return self.stage.is_image

    def counts(self, cut: Cut) -> Tensor:
        """[B], how many image tokens a sample keeps; all where nothing asks."""
        kept = (2 * self.num_images * cut.kept + cut.of) // (2 * cut.of)
        return torch.where(self.asking.any(dim=1), kept, self.is_image.sum(dim=1))

    def keep(self, scores: Tensor, counts: Tensor) -> Tensor:
        """[B, N] bool, text and the `counts` [B] image tokens that stay or have the largest scores [B, N]."""
        return keep_best(scores.masked_fill(self.stays, torch.inf), self.is_image, counts) | self.stays

    def attention(self) -> tuple[Tensor, Tensor]:
        """Attention of the asking tokens on all tokens of the stage.

        Returns:
            probabilities [B, H, Q, N] in float32, of a softmax over stored and new tokens; and [B, Q] bool, False where
            a sample asks with fewer tokens.
        """
        index, is_asking = align_right(self.asking)
        queries = self._queries(index)
        batch, heads, asking, width = queries.shape
        if heads != (expected := self.layer.self_attn.config.num_attention_heads):
            raise UserError(
                f"Under tensor parallelism a process has {heads} of {expected} heads, and tokens are dropped by the "
                "mean over all of them: run without it, or without the reduction."
            )
        groups, keys = self.keys.shape[1:3]
        queries = queries.reshape(batch, groups, heads // groups * asking, width)
        logits = queries @ self.keys.transpose(2, 3) * self.layer.self_attn.scaling
        logits = logits.float().view(batch, heads, asking, keys)
        seen = self.stage.live[:, None, :] & (
            torch.arange(self.inputs.shape[1], device=index.device) <= index[:, :, None]
        )
        if (stored := self.keys.shape[2] - self.inputs.shape[1]) > 0:
            before = seen.new_ones(batch, stored) if self.stored is None else self.stored
            seen = torch.cat([before[:, None].expand(-1, asking, -1), seen], dim=2)
        logits = logits.masked_fill(~seen[:, None], torch.finfo(logits.dtype).min)
        return logits.softmax(dim=-1)[..., stored:], is_asking

    def _queries(self, index: Tensor) -> Tensor:
        """The queries of tokens [B, Q] of the stage, [B, H, Q, E]."""
        attention = self.layer.self_attn
        normed = self.layer.input_layernorm(self.inputs.gather(1, wide(index, self.inputs)))
        queries = attention.q_proj(normed).unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, "q_norm"):
            queries = attention.q_norm(queries)
        cosine, sine = self._embeddings(index)
        return apply_rotary_pos_emb(queries.transpose(1, 2), queries.transpose(1, 2), cosine, sine)[0]

    def _embeddings(self, index: Tensor) -> list[Tensor]:
        return [rows_of(table, index) for table in self.embeddings]

    def position_kernel(self) -> Tensor:
        """What positions alone give: products of all-ones queries and keys over the root of E, [B, Q, N]."""
        index, _ = align_right(self.asking)
        cosine, sine = (table.float() for table in self.embeddings)
        ones = torch.ones_like(cosine)[:, None]
        turned = apply_rotary_pos_emb(ones, ones, cosine, sine)[0][:, 0]
        return rows_of(turned, index) @ turned.transpose(1, 2) / turned.shape[-1] ** 0.5


class KeyRecorder:
    """Stands in for the cache of one layer and notes the keys that its attention sees."""

    def __init__(self, cache: Cache | None) -> None:
        self.cache = cache
        self.keys: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As in a cache; without one the tensors themselves."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        self.keys = keys
        return keys, values


def keys_of(layer: Any, inputs: Tensor, embeddings: tuple[Tensor, Tensor], stored: Tensor | None = None) -> Tensor:
    """The keys of a layer that has not run, with positions.

    Args:
        layer: a decoder layer.
        inputs: [B, N, D], what it will get.
        embeddings: cosine and sine, [B or 1, N, E].
        stored: [B, key-value heads, K, E], those that it has stored; None if there are none.

    Returns:
        [B, key-value heads, K + N, E].
    """
    attention = layer.self_attn
    keys = attention.k_proj(layer.input_layernorm(inputs)).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    keys = apply_rotary_pos_emb(keys.transpose(1, 2), keys.transpose(1, 2), *embeddings)[0]
    return keys if stored is None else torch.cat([stored, keys], dim=2)


def wide(index: Tensor, like: Tensor) -> Tensor:
    """An index of tokens [B, N] as one into hidden states [B, N, D]."""
    return index.unsqueeze(-1).expand(-1, -1, like.shape[-1])


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """Rows [B, Q] of a table [B or 1, N, E] -> [B, Q, E]."""
    return table.expand(len(index), -1, -1).gather(1, wide(index, table))
