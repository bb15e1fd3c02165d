"""The front ends: each gives a picture's visual tokens, the retained ones first.

Shapes: N pictures, P visual tokens of a picture, D width of the language model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.errors import UserError
from llava_skip.tokens import retained_first
from llava_skip.vision.clip import ClipTower


class Group(NamedTuple):
    """Pictures with equally many visual tokens: their places among all pictures, and tokens [n, P, D]."""

    places: list[int]
    tokens: Tensor


def visual_tokens(
    tower: ClipTower, projector: nn.Module, pixel_values: Tensor, crop_counts: Tensor | None, config: LlavaSkipConfig
) -> list[Group]:
    """Visual tokens of all pictures, in groups of equal length; there is one group unless lengths differ.

    Args:
        tower: the vision tower.
        projector: from the tower's features to the language model's width; a resampler for `cos`.
        pixel_values: [N, 3, side, side]; for `hd` [crops of all pictures, 3, side, side].
        crop_counts: [N], for `hd` alone.
        config: names the front end.

    Raises:
        UserError: `crop_counts` is missing, or does not add up.
    """
    if config.front_end == "hd":
        return _tiles(tower, projector, pixel_values, crop_counts, config)
    tokens = (_scales if config.front_end == "cos" else _patches)(tower, projector, pixel_values, config)
    return [Group(list(range(tokens.shape[0])), tokens)]


def _patches(tower: ClipTower, projector: nn.Module, pixel_values: Tensor, config: LlavaSkipConfig) -> Tensor:
    """LLaVA: patches of one CLIP layer; those that the class token attends to most lead."""
    skip = config.skip_config
    ranked = skip if config.front_end == "llava" else None
    features, scores = tower(pixel_values, config.vision_feature_layer, rank=ranked is not None)
    patches = features if config.vision_feature_select_strategy == "full" else features[:, 1:]
    if ranked is not None:
        patches = retained_first(patches, scores, ranked.retained)
    return projector(patches)


def _tiles(
    tower: ClipTower, projector: nn.Module, pixel_values: Tensor, crop_counts: Tensor | None, config: LlavaSkipConfig
) -> list[Group]:
    """LLaVA-HD: the thumbnail leads, then the tiles; the tower runs once over all crops of the batch."""
    counts = [] if crop_counts is None else crop_counts.tolist()
    if sum(counts) != pixel_values.shape[0]:
        raise UserError(
            f"front_end 'hd' has {pixel_values.shape[0]} crops, and crop_counts says {counts or 'nothing'}: give the "
            "crop_counts of the processor along with its pixel_values."
        )
    pictures = _patches(tower, projector, pixel_values, config).split(counts)
    groups = []
    for count in sorted(set(counts)):
        places = [place for place, crops in enumerate(counts) if crops == count]
        groups.append(Group(places, torch.stack([pictures[place] for place in places]).flatten(1, 2)))
    return groups


def _scales(tower: ClipTower, resampler: nn.Module, pixel_values: Tensor, config: LlavaSkipConfig) -> Tensor:
    """Chain of sight: the scales of the resampler, the coarse ones first."""
    assert config.resampler_config is not None  # checked with front_end
    states = tower.hidden_states(pixel_values, config.resampler_config.hidden_states)
    return resampler([state[:, 1:] for state in states])
