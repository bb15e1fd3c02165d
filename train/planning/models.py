"""The model that a plan is for: by its size, by a published name, by the recipe that makes it, or by its folder."""

from __future__ import annotations

from pathlib import Path

from transformers import LlavaConfig

from llava_skip.checkpoints import load_config
from llava_skip.configuration import LlavaSkipConfig
from llava_skip.presets import preset_config, skip_for_model
from llava_skip.reduction import ReductionConfig
from llava_skip.sizes import PUBLISHED, SIZES
from llava_skip_base.errors import UserError
from llava_skip_base.files import local_path
from llava_skip_base.paths import checkpoints
from train.recipe.recipes import read_recipe, recipe_names

RUNS = "{checkpoints}/"


def size_of(model: str | None, size: str | None) -> str | None:
    """The size of a model that is not here: given, published, or that of the recipe whose run writes it."""
    if size is not None or model is None:
        return size or "tiny"
    seen = set()
    while model is not None and model not in seen:
        seen.add(model)
        if model in PUBLISHED:
            return PUBLISHED[model]
        model = _made_from(model)
    return None


def _made_from(model: str) -> str | None:
    """The model that the recipe starts from whose run writes this one; None if no recipe does."""
    name = model.removeprefix(RUNS)
    try:
        name = str(Path(name).resolve().relative_to(checkpoints())) if name == model else name
    except ValueError:
        return None
    for recipe in map(read_recipe, recipe_names()):
        if recipe.get("output_dir") == RUNS + name:
            return recipe.get("model")
    return None


def config_for(model: str | None, size: str | None, preset: str | None, reduction: str | None) -> LlavaSkipConfig:
    """The configuration of a model with a preset, or with a rival method.

    Raises:
        UserError: the size is not known, or the numbers do not fit the model.
    """
    if size is not None and size not in SIZES:
        raise UserError(f"--size is {size!r}; known: {', '.join(SIZES)}.")
    if size is None and model is not None and (folder := local_path(model)) and folder.is_dir():
        config = _of_folder(str(folder), preset)
    elif (found := size_of(model, size)) is None:
        raise UserError(
            f"What {model} costs is not known: it is no folder here, no published model of a known size "
            f"({', '.join(PUBLISHED)}), and no recipe writes it. Give --size, one of {', '.join(SIZES)}."
        )
    else:
        config = preset_config(preset or "llava", found)
    return config if reduction is None else config.with_reduction(ReductionConfig.parse(reduction))


def _of_folder(folder: str, preset: str | None) -> LlavaSkipConfig:
    config, _ = load_config(folder, None)
    assert isinstance(config, LlavaConfig)
    if preset is None:
        return config
    skip = skip_for_model(preset, config)
    fields = {"preset": preset, "skip": None if skip is None else skip.to_dict(), "reduction": None}
    return LlavaSkipConfig.from_dict(config.to_dict() | fields)
