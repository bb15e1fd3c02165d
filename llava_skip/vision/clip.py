"""CLIP's vision tower, run as far as its features are used.

Shapes: N images, P patches of an image, C width of the tower, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from llava_skip_base.errors import UserError


class ClipTower(CLIPVisionModel):
    """transformers' CLIPVisionModel that gives one layer's hidden states instead of the last layer's."""

    def forward(self, pixel_values: Tensor, feature_layer: int, rank: bool = False) -> tuple[Tensor, Tensor | None]:
        """Features of a layer, and how much its class token attends to each patch.

        Args:
            pixel_values: [N, 3, side, side].
            feature_layer: index into transformers' list of hidden states (0 is the embedding, -1 the last layer).
            rank: whether to compute the scores.

        Returns:
            hidden states [N, 1 + P, C], the class token first; scores [N, P] (summed over heads) or None.

        Raises:
            UserError: images of another size than the tower's, or a layer that it does not have.
        """
        hidden_states = self._embed(pixel_values)
        layers = self.encoder.layers[: self._used_layers(feature_layer, rank)]
        entering = hidden_states
        for layer in layers:
            entering, hidden_states = hidden_states, layer(hidden_states, None)
        return hidden_states, class_attention(layers[-1], entering).sum(dim=1) if rank else None

    def hidden_states(self, pixel_values: Tensor, indices: Sequence[int], side: int | None = None) -> list[Tensor]:
        """Several entries of transformers' list of hidden states, each [N, 1 + P, C]; later layers are not run.

        With `side` the images are made smaller first, to side x side patches.
        """
        state = self._embed(pixel_values, side)
        states = {0: state}
        for index, layer in enumerate(self.encoder.layers[: max(indices)]):
            state = layer(state, None)
            if index + 1 in indices:
                states[index + 1] = state
        return [states[index] for index in indices]

    def outputs(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """What transformers' CLIPVisionModel gives: the states of the last layer, and more if asked for."""
        return super().forward(pixel_values.to(self.dtype), **kwargs)

    def _embed(self, pixel_values: Tensor, side: int | None = None) -> Tensor:
        """What enters the first layer; of images of side x side patches, if `side` is given."""
        pixels = self.config.image_size
        if pixel_values.shape[-2:] != (pixels, pixels):
            raise UserError(
                f"Images are {tuple(pixel_values.shape[-2:])} pixels, the vision tower takes {(pixels, pixels)}: "
                "set the image processor's crop_size to the tower's image_size."
            )
        embedded = self.embeddings(pixel_values.to(self.dtype))
        if side is not None and side != pixels // self.config.patch_size:
            # The class token's row comes from the whole module, which ZeRO-3 gathers the class embedding for.
            embedded = torch.cat([embedded[:, :1], self._embed_smaller(pixel_values, side)], dim=1)
        states = self.pre_layrnorm(embedded)
        # Activation checkpointing makes transformers ask for gradients of a model's embeddings, these too: a frozen
        # tower would then be run a second time and backwards, for nothing.
        trained = pixel_values.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        return states if trained else states.detach()

    def _embed_smaller(self, pixel_values: Tensor, side: int) -> Tensor:
        """Embeddings of the patches [N, side * side, C] of images that are made smaller, with positions to match."""
        pixels = side * self.config.patch_size
        smaller = nn.functional.interpolate(pixel_values.float(), size=(pixels, pixels), mode="bicubic", antialias=True)
        patches = self.embeddings.patch_embedding(smaller.to(self.dtype)).flatten(2).transpose(1, 2)
        table = self.embeddings.position_embedding(self.embeddings.position_ids)[0]
        return patches + resize_positions(table, side * side)[1:]

    def _used_layers(self, feature_layer: int, rank: bool) -> int:
        depth = len(self.encoder.layers)
        used = feature_layer if feature_layer >= 0 else depth + 1 + feature_layer
        if not (1 if rank else 0) <= used <= depth:
            raise UserError(f"vision_feature_layer is {feature_layer}, but the tower has {depth} layers.")
        return used


@torch.no_grad()
def class_attention(layer: CLIPEncoderLayer, hidden_states: Tensor) -> Tensor:
    """Attention of the class token to the patches in one layer, from one query: no attention map is formed.

    Args:
        layer: the layer.
        hidden_states: [N, 1 + P, C], as they enter it.

    Returns:
        [N, H, P] softmax probabilities over class token and patches, the class token's own column left out.
    """
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden_states)
    query, key = (_heads(layer, part) for part in (attention.q_proj(normed[:, :1]), attention.k_proj(normed)))
    scores = (query * attention.scale) @ key.transpose(-1, -2)
    return scores.float().softmax(dim=-1)[:, :, 0, 1:]


@torch.no_grad()
def mean_attention(layer: CLIPEncoderLayer, hidden_states: Tensor) -> Tensor:
    """Attention that each patch gets in one layer, the mean over heads and all queries; one head's map at a time.

    Args:
        layer: the layer.
        hidden_states: [N, 1 + P, C], as they enter it.

    Returns:
        [N, P].
    """
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden_states)
    queries, keys = (_heads(layer, part) for part in (attention.q_proj(normed), attention.k_proj(normed)))
    total = hidden_states.new_zeros(hidden_states.shape[:2], dtype=torch.float32)
    for query, key in zip(queries.unbind(1), keys.unbind(1), strict=True):
        total += ((query * attention.scale) @ key.transpose(-1, -2)).float().softmax(dim=-1).mean(dim=1)
    return total[:, 1:] / attention.num_heads


@torch.no_grad()
def mean_keys(layer: CLIPEncoderLayer, hidden_states: Tensor) -> Tensor:
    """Keys of one layer, the mean over heads [N, 1 + P, E]; `hidden_states` [N, 1 + P, C] as they enter it."""
    return _heads(layer, layer.self_attn.k_proj(layer.layer_norm1(hidden_states))).mean(dim=1)


@torch.no_grad()
def class_query_and_keys(layer: CLIPEncoderLayer, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """The class token's query [N, 1, C] and all keys [N, 1 + P, C] of one layer, all heads as one vector."""
    normed = layer.layer_norm1(hidden_states)
    return layer.self_attn.q_proj(normed[:, :1]), layer.self_attn.k_proj(normed)


def _heads(layer: CLIPEncoderLayer, projected: Tensor) -> Tensor:
    """[N, rows, C] -> [N, H, rows, E]."""
    return projected.unflatten(-1, (layer.self_attn.num_heads, layer.self_attn.head_dim)).transpose(1, 2)


def resize_positions(table: Tensor, patches: int) -> Tensor:
    """Position embeddings [1 + P, C] for a square grid of `patches` patches; the class token's stays.

    Bicubic with aligned corners, as the paper's code does for its larger images; transformers' own resizing does not
    align them and gives other numbers.

    Raises:
        UserError: one of the two grids is not a square.
    """
    old, new = round((table.shape[0] - 1) ** 0.5), round(patches**0.5)
    if old * old != table.shape[0] - 1 or new * new != patches:
        raise UserError(f"Positions of {table.shape[0] - 1} patches cannot become {patches}: both must be squares.")
    grid = table[1:].float().T.reshape(1, -1, old, old)
    resized = nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=True)
    return torch.cat([table[:1], resized.flatten(2)[0].T.to(table.dtype)])
