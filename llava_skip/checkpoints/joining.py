"""Filling a model with weights that all fit: nothing is left over, missing or of another shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from transformers import CLIPVisionConfig, PreTrainedModel

from llava_skip.checkpoints.names import native_name
from llava_skip.configuration import LlavaSkipConfig
from llava_skip.errors import UserError
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip.vision.clip import resize_positions


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], may_miss: Iterable[str] = ()) -> None:
    """Copy weights with native names into a model; nothing may be left over, missing or of another shape.

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


POSITIONS = "model.vision_tower.embeddings.position_embedding.weight"


def fit_positions(weights: dict[str, Tensor], vision: CLIPVisionConfig) -> tuple[int, int] | None:
    """Resize the position table among native weights to the pictures of `vision`; old and new rows if it did."""
    table, patches = weights.get(POSITIONS), (vision.image_size // vision.patch_size) ** 2
    if table is None or table.shape[0] == patches + 1:
        return None
    weights[POSITIONS] = resize_positions(table, patches)
    return table.shape[0], patches + 1


def build_from_parts(
    config: LlavaSkipConfig, language: PreTrainedModel, tower: PreTrainedModel
) -> LlavaSkipForConditionalGeneration:
    """Join a language model and a vision tower; projector and summary layer are new.

    Args:
        config: of the joined model; its vocabulary may be larger than the language model's, by the image token.
        language: a causal language model of `config.text_config`'s type.
        tower: a CLIP vision model of `config.vision_config`; its position table is resized if that has larger pictures.

    Raises:
        UserError: a weight of the two is missing, unknown or of another shape.
    """
    language.resize_token_embeddings(config.text_config.vocab_size)
    model = LlavaSkipForConditionalGeneration(config)
    weights = {native_name(name): tensor for name, tensor in language.state_dict().items()}
    weights |= {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    fit_positions(weights, config.vision_config)
    load_weights(model, weights, may_miss=("model.multi_modal_projector.", "model.summary."))
    return model
