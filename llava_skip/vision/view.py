"""What a method that selects tokens may look at: the crops of a batch, each part computed when it is asked for.

Shapes: N crops, P visual tokens of a crop, C width of the tower, H its heads, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from llava_skip.reduction.choosing import take
from llava_skip.vision.clip import ClipTower, class_attention

if TYPE_CHECKING:
    from llava_skip.configuration import LlavaSkipConfig
    from llava_skip.vision.front_end import FrontEnd


class View:
    """The crops of a batch on their way through tower and projector.

    Args:
        front_end: of the model.
        tower: the vision tower.
        projector: what the front end built.
        pixel_values: [N, 3, side, side].
        config: of the model.
        states: entries of the tower's list of hidden states that are needed beside the features.
    """

    def __init__(
        self,
        front_end: FrontEnd,
        tower: ClipTower,
        projector: nn.Module,
        pixel_values: Tensor,
        config: LlavaSkipConfig,
        states: Collection[int] = (),
    ) -> None:
        self.front_end, self.tower, self.projector = front_end, tower, projector
        self.pixel_values, self.config = pixel_values, config
        self._needed = states

    @property
    def count(self) -> int:
        """P."""
        return self.config.visual_tokens(1)

    @property
    def layer(self) -> int:
        """Index of the tower's layer that the features come out of."""
        return self.config.used_tower_layers - 1

    @property
    def side(self) -> int:
        """Patches on a side of a crop."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    @cached_property
    def _states(self) -> dict[int, Tensor]:
        indices = sorted({*self._needed, self.layer + 1})
        return dict(zip(indices, self.tower.hidden_states(self.pixel_values, indices), strict=True))

    def entering(self, index: int) -> tuple[CLIPEncoderLayer, Tensor]:
        """A layer of the tower and what enters it, [N, 1 + P, C]."""
        return self.tower.encoder.layers[index], self._states[index]

    @property
    def features(self) -> Tensor:
        """[N, 1 + P, C], the class token first."""
        return self._states[self.layer + 1]

    @property
    def patches(self) -> Tensor:
        """[N, P, C], the features without the class token."""
        return self.features[:, 1:]

    @cached_property
    def class_scores(self) -> Tensor:
        """[N, H, P], attention of the class token to the patches in the layer of the features."""
        return class_attention(*self.entering(self.layer))

    @cached_property
    def tokens(self) -> Tensor:
        """[N, P, D], the visual tokens of the dense model."""
        if self.front_end.gives_patches:
            return self.projector(self.patches)
        return self.front_end.tokens(self.tower, self.projector, self.pixel_values, self.config)

    def smaller(self, side: int) -> Tensor:
        """[N, side * side, D], the visual tokens of the crops made smaller, to side x side patches."""
        (features,) = self.tower.hidden_states(self.pixel_values, [self.layer + 1], side)
        return self.projector(features[:, 1:])

    def keep(self, indices: Tensor) -> Tensor:
        """The visual tokens at indices [N, T], [N, T, D]; only these are projected, where that is possible."""
        if self.front_end.gives_patches and "tokens" not in self.__dict__:
            return self.projector(take(self.patches, indices))
        return take(self.tokens, indices)
