"""What a frozen tower gave for a batch, kept or given back, so that an image need not pass through it again.

Shapes: n crops, P patches of a crop, C width of the tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_skip.vision.clip import ClipTower
from llava_skip.vision.front_end import get_front_end

if TYPE_CHECKING:
    from llava_skip.configuration import LlavaSkipConfig

SCORES = "scores"


@dataclass
class TowerFeatures:
    """The features of a batch's crops, which a model's forward uses in place of its images, or fills from them.

    Attributes:
        keys: [n] names of the crops.
        states: name -> what the tower gives for each crop, [n, ...]; empty: the forward runs the tower and fills it.
        damaged: crops whose stored features could not be used.
        pixel_values: [n, 3, side, side] of a forward that fills them.
    """

    keys: list[str] = field(default_factory=list)
    states: dict[str, Tensor] = field(default_factory=dict)
    damaged: int = 0
    pixel_values: Tensor | None = None

    def __post_init__(self) -> None:
        self.were_stored = bool(self.states)

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, *args: Any, **kwargs: Any) -> TowerFeatures:
        """The same on a device, as `Tensor.to`; numbers keep their type: scores that are rounded rank otherwise."""
        return replace(self, states={name: state.to(*args, **kwargs) for name, state in self.states.items()})

    def pin_memory(self) -> TowerFeatures:
        """The same in pinned memory; a loader calls it."""
        return replace(self, states={name: state.pin_memory() for name, state in self.states.items()})

    def of_images(self, pixel_values: Tensor | None) -> TowerFeatures:
        """These features, of images that may be left out where the features are stored."""
        self.pixel_values = pixel_values
        return self

    def in_place_of(self, tower: ClipTower) -> tuple[Any, Tensor]:
        """What a front end is given in place of the tower and of its images; these, or a tensor of as many rows."""
        images = next(iter(self.states.values())) if self.pixel_values is None else self.pixel_values
        return StoredTower(tower, self.states), images


Pixels = Tensor | TowerFeatures
"""The images of a forward: their crops, or the features of these."""


class StoredTower:
    """Answers as `ClipTower` does, from states that it has; what it does not have it asks the tower for, and keeps."""

    def __init__(self, tower: ClipTower, states: dict[str, Tensor]) -> None:
        self._tower, self._states = tower, states

    def __call__(self, pixel_values: Tensor, feature_layer: int, rank: bool = False) -> tuple[Tensor, Tensor | None]:
        """As `ClipTower.forward`."""
        name = f"layer{feature_layer}"
        if name not in self._states:
            features, scores = self._tower(pixel_values, feature_layer, rank=rank)
            self._states |= {name: features} | ({SCORES: scores} if rank else {})
        return self._states[name], self._states[SCORES] if rank else None

    def hidden_states(self, pixel_values: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """As `ClipTower.hidden_states`, for images of their own size."""
        names = [f"layer{index}" for index in indices]
        if not self._states:
            self._states |= dict(zip(names, self._tower.hidden_states(pixel_values, indices), strict=True))
        return [self._states[name] for name in names]


def crop_bytes(config: LlavaSkipConfig, dtype: torch.dtype) -> int:
    """Bytes that are stored of one crop, by a tower in `dtype`."""
    front_end, features, side = get_front_end(config.front_end), TowerFeatures(), config.vision_config.image_size
    with torch.device("meta"):
        tower, projector = ClipTower(config.vision_config).to(dtype), front_end.build_projector(config).to(dtype)
        stored, pixels = features.of_images(torch.empty(1, 3, side, side)).in_place_of(tower)
        front_end.tokens(stored, projector, pixels, config)
    return sum(state.nbytes for state in features.states.values())
