"""The front end of LLaVA. Every front end gives a picture's tokens [N, P, D], the retained ones first."""

from __future__ import annotations

from torch import Tensor, nn

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.tokens import retained_first
from llava_skip.vision.clip import ClipTower


def llava_front_end(tower: ClipTower, projector: nn.Module, pixel_values: Tensor, config: LlavaSkipConfig) -> Tensor:
    """Patches of one CLIP layer in the language model's width; the R that the class token attends to most lead.

    Args:
        tower: the vision tower.
        projector: from the tower's width to the language model's.
        pixel_values: [N, 3, side, side].
        config: `skip_config` says how many patches are retained; a dense model keeps the order of the picture.

    Returns:
        [N, P, D].
    """
    skip = config.skip_config
    features, scores = tower(pixel_values, config.vision_feature_layer, rank=skip is not None)
    patches = features if config.vision_feature_select_strategy == "full" else features[:, 1:]
    if skip is not None:
        patches = retained_first(patches, scores, skip.retained)
    return projector(patches)
