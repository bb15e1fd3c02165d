"""Another front end for a trained model: its tower and language model stay, the projector is new."""

from __future__ import annotations

import torch

from llava_skip.checkpoints.loading import load_weights
from llava_skip.checkpoints.names import HEAD, LANGUAGE_MODEL, POSITIONS, PROJECTOR, TOWER
from llava_skip.configuration import LlavaSkipConfig
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip.presets import fields_for_tower
from llava_skip.vision.clip import resize_positions


def with_new_front_end(
    model: LlavaSkipForConditionalGeneration, preset: str, size: str, seed: int = 0
) -> LlavaSkipForConditionalGeneration:
    """A model of a preset with the tower and the language model of a trained one; projector and summaries are new.

    The projector has learned nothing, so that the result has to be trained. If the front end reads larger or smaller
    images, the tower's position table is resized.

    Args:
        model: any model; it is not changed.
        preset: a key of `PRESETS`.
        size: a key of `SIZES`, whose numbers the front end takes (image size, layers that it reads, queries).
        seed: of the new weights.

    Raises:
        UserError: an unknown preset or size, or a tower that does not fit the front end.
    """
    old = model.config
    config = LlavaSkipConfig(
        text_config=old.text_config,
        image_token_index=old.image_token_index,
        **fields_for_tower(preset, old.vision_config, size),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = LlavaSkipForConditionalGeneration(config).to(model.dtype)
    kept = {
        name: tensor for name, tensor in model.state_dict().items() if name.startswith((TOWER, LANGUAGE_MODEL, HEAD))
    }
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    if kept[POSITIONS].shape[0] != patches + 1:
        kept[POSITIONS] = resize_positions(kept[POSITIONS], patches)
    load_weights(new, kept, may_miss=(PROJECTOR, "model.summary."))
    new.generation_config = model.generation_config
    return new.eval()
