"""Fit weights to a model: nothing may be unknown, missing or of another shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from transformers import CLIPVisionConfig

from llava_skip.checkpoints.names import POSITIONS
from llava_skip.errors import UserError
from llava_skip.vision.clip import resize_positions


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], may_miss: Iterable[str] = ()) -> None:
    """Copy weights with native names into a model; nothing may be unknown, missing or of another shape.

    Args:
        model: the model.
        weights: tensors by native name.
        may_miss: prefixes of parameters that may keep the values they have.

    Raises:
        UserError: lists what is missing, unknown or of another shape.
    """
    own = model.state_dict()
    skipped = tuple(may_miss)
    missing = [name for name in own if name not in weights and not (skipped and name.startswith(skipped))]
    unknown = [name for name in weights if name not in own]
    reshaped = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
        for name in weights
        if name in own and weights[name].shape != own[name].shape
    ]
    if missing or unknown or reshaped:
        raise UserError(f"The weights do not fit the model. Missing: {missing}. Unknown: {unknown}. Shape: {reshaped}.")
    model.load_state_dict(weights, strict=False)


def fit_positions(weights: dict[str, Tensor], vision: CLIPVisionConfig) -> tuple[int, int] | None:
    """Resize the position table among native weights to the images of `vision`; old and new rows if it did."""
    table, patches = weights.get(POSITIONS), (vision.image_size // vision.patch_size) ** 2
    if table is None or table.shape[0] == patches + 1:
        return None
    weights[POSITIONS] = resize_positions(table, patches)
    return table.shape[0], patches + 1
