"""Named presets: the models of the paper's tables, at the sizes that the project runs them in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig

from llava_skip.configuration import LlavaSkipConfig, SkipConfig
from llava_skip.sizes import SIZES
from llava_skip.vision import FrontEnd, get_front_end
from llava_skip_base.errors import UserError

PAPER_PATCHES = 576
"""Visual tokens of CLIP-L/14 at 336 pixels, to which the R and S of the paper belong."""
DEFAULT_PRESET = "sv-llava-256"
"""Preset of a new model."""


@dataclass(frozen=True)
class Preset:
    """A model of the paper's tables at a tower of 576 patches; for `cos` of 1024, at 448 pixels.

    Attributes:
        name: the preset's.
        skip: the method's numbers, None for a dense model.
        front_end: name of the front end.
        windows: for `cos`, what the side of the features is divided by to give the window of each scale.
        queries: for `cos`, the queries of each scale.
    """

    name: str
    skip: SkipConfig | None = None
    front_end: str = "llava"
    windows: tuple[int, ...] = ()
    queries: tuple[int, ...] = ()

    def skip_for(self, patches: int) -> SkipConfig | None:
        """The `SkipConfig` for a tower of `patches` patches a crop, in the proportion of the paper's numbers."""
        if self.skip is None or patches == PAPER_PATCHES:
            return self.skip
        return get_front_end(self.front_end).scale_skip(self.skip, patches / PAPER_PATCHES, patches)


_COS: dict[str, Any] = {"front_end": "cos", "windows": (1, 4, 16), "queries": (16, 256, 1024)}

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("llava"),
        Preset("sv-llava-64", SkipConfig(retained=64, skipped=156)),  # paper, table 2
        Preset("sv-llava-100", SkipConfig(retained=100, skipped=156)),  # paper, table 1
        Preset("sv-llava-256", SkipConfig(retained=256, skipped=320)),  # paper, table 1
        Preset("llava-hd", front_end="hd"),
        Preset("sv-llava-hd", SkipConfig(retained=576, skipped=576), front_end="hd"),  # paper, table 1
        Preset("cos", **_COS),
        Preset("cos-336", front_end="cos", windows=(1, 2, 8), queries=(16, 64, 256)),
        Preset("cos-80", front_end="cos", windows=(1, 4), queries=(16, 64)),
        # Paper, table 1. The summary of the retained tokens leaves out the 16 coarse ones; the last skipped token goes
        # through the FFN.
        Preset("sv-cos", SkipConfig(272, 256, summaries=((16, 272), (272, 528)), ffn_tail=1), **_COS),
    )
}


def register_preset(preset: Preset) -> None:
    """Make a preset known by its name.

    Raises:
        UserError: another one has the name.
    """
    if preset.name in PRESETS:
        raise UserError(f"There is a preset {preset.name!r} already: choose another name.")
    PRESETS[preset.name] = preset


def _choose(table: dict[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise UserError(f"Unknown {what} {name!r}; known: {', '.join(table)}.")
    return table[name]


def front_end_of(preset: str) -> FrontEnd:
    """The front end of a preset.

    Raises:
        UserError: an unknown preset; the message lists the known ones.
    """
    return get_front_end(_choose(PRESETS, preset, "preset").front_end)


def dense_preset(preset: str) -> str:
    """The dense preset that a preset is compared with: the first one of its front end, or "llava" if it has none."""
    front_end = front_end_of(preset)
    dense = (name for name, other in PRESETS.items() if other.skip is None and front_end_of(name) is front_end)
    return next(dense, "llava")


def preset_skip(preset: str, patches: int = PAPER_PATCHES) -> SkipConfig | None:
    """The `SkipConfig` of a preset for a tower of `patches` patches a crop.

    Raises:
        UserError: an unknown preset.
    """
    return _choose(PRESETS, preset, "preset").skip_for(patches)


def preset_config(preset: str, size: str = "tiny", **overrides: Any) -> LlavaSkipConfig:
    """The whole model configuration of a preset at a size.

    Args:
        preset: a key of `PRESETS`.
        size: a key of `SIZES`.
        **overrides: fields of the language model that replace those of the size (for example `vocab_size`).

    Raises:
        UserError: an unknown preset or size.
    """
    return config_at(preset, _choose(SIZES, size, "size"), **overrides)


def config_at(preset: str, numbers: Mapping[str, Any], **overrides: Any) -> LlavaSkipConfig:
    """As `preset_config`, at widths that have no name: `numbers` are like an entry of `SIZES`."""
    return LlavaSkipConfig(
        text_config=LlamaConfig(**{**numbers["text"], **overrides}),
        image_token_index=numbers["image_token"],
        **_tower_fields(preset, CLIPVisionConfig(**numbers["vision"]), numbers),
    )


def fields_for_tower(preset: str, vision: CLIPVisionConfig, size: str = "vicuna-7b") -> dict[str, Any]:
    """The fields of a `LlavaSkipConfig` that a preset decides for a vision tower.

    Args:
        preset: a key of `PRESETS`.
        vision: of the tower; a front end may set another image size.
        size: whose numbers of the front end are used.

    Raises:
        UserError: an unknown preset, or a tower that does not fit the front end.
    """
    return _tower_fields(preset, vision, _choose(SIZES, size, "size"))


def _tower_fields(preset: str, vision: CLIPVisionConfig, numbers: Mapping[str, Any]) -> dict[str, Any]:
    chosen = _choose(PRESETS, preset, "preset")
    own = numbers.get(chosen.front_end, {})
    if "image_size" in own:
        vision = CLIPVisionConfig(**vision.to_dict() | {"image_size": own["image_size"]})
    fields = {"front_end": chosen.front_end, "preset": preset, "vision_config": vision}
    return fields | get_front_end(chosen.front_end).preset_fields(chosen, vision, own)


def skip_for_model(preset: str, config: LlavaSkipConfig) -> SkipConfig | None:
    """The `SkipConfig` of a preset for a model that exists; its architecture and sizes stay.

    Raises:
        UserError: an unknown preset, or one of another architecture, whose projector would not fit.
    """
    chosen = _choose(PRESETS, preset, "preset")
    front_end = get_front_end(config.front_end)
    if not front_end.fits(chosen, config):
        fitting = [name for name, other in PRESETS.items() if front_end.fits(other, config)]
        raise UserError(
            f"The model has {front_end.describe(config)}, the preset {preset!r} is for another one, whose projector "
            f"would not fit; presets of the model's: {', '.join(fitting)}."
        )
    return front_end.preset_skip(chosen, config)


def preset_rows() -> list[tuple[str, int, int, int | None, int]]:
    """Of each preset at the paper's size: name, visual tokens, retained, skipped (None: dense), tokens in the cache."""
    rows: list[tuple[str, int, int, int | None, int]] = []
    for name in PRESETS:
        config = preset_config(name, "vicuna-7b")
        total, skip = config.visual_tokens(config.most_crops), config.skip_config
        if skip is None:
            rows.append((name, total, total, None, total))
        else:
            rows.append((name, total, skip.retained, skip.skipped, skip.num_kept))
    return rows
