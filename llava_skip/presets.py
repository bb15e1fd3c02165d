"""Named presets: the models of the paper's tables, at the sizes that the project runs them in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig

from llava_skip.configuration import LlavaSkipConfig, SkipConfig
from llava_skip.errors import UserError
from llava_skip.vision.resampler import ResamplerConfig

PAPER_PATCHES = 576
"""Visual tokens of CLIP-L/14 at 336 pixels, to which the R and S of the paper belong."""


@dataclass(frozen=True)
class Preset:
    """A model of the paper's tables at a tower of 576 patches; for `cos` of 1024, at 448 pixels.

    Attributes:
        skip: the method's numbers, None for a dense model.
        front_end: how a picture becomes visual tokens.
        windows: for `cos`, what the side of the features is divided by to give the window of each scale.
        queries: for `cos`, the queries of each scale.
    """

    skip: SkipConfig | None = None
    front_end: str = "llava"
    windows: tuple[int, ...] = ()
    queries: tuple[int, ...] = ()


_COS: dict[str, Any] = {"front_end": "cos", "windows": (1, 4, 16), "queries": (16, 256, 1024)}

PRESETS: dict[str, Preset] = {
    "llava": Preset(),
    "sv-llava-64": Preset(SkipConfig(retained=64, skipped=156)),  # paper, table 2
    "sv-llava-100": Preset(SkipConfig(retained=100, skipped=156)),  # paper, table 1
    "sv-llava-256": Preset(SkipConfig(retained=256, skipped=320)),  # paper, table 1
    "llava-hd": Preset(front_end="hd"),
    "sv-llava-hd": Preset(SkipConfig(retained=576, skipped=576), front_end="hd"),  # paper, table 1
    "cos": Preset(**_COS),
    "cos-336": Preset(front_end="cos", windows=(1, 2, 8), queries=(16, 64, 256)),
    "cos-80": Preset(front_end="cos", windows=(1, 4), queries=(16, 64)),
    # Paper, table 1; the summary of the retained leaves the 16 coarse tokens out, the last skipped one keeps its FFN.
    "sv-cos": Preset(SkipConfig(retained=272, skipped=256, summaries=((16, 272), (272, 528)), ffn_tail=1), **_COS),
}

_CLIP_L_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}

_COS_TOWER: dict[str, Any] = {"image_size": 448, "levels": (15, 22), "width": 1024, "queries_divided_by": 1}

# The vocabularies hold one more token than the language model's own, <image>, rounded up to a multiple of 64.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vision": {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 48,
            "patch_size": 8,
            "projection_dim": 128,
            "initializer_range": 0.08,
            "initializer_factor": 2.0,
        },
        "text": {
            "vocab_size": 576,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
            # 1 / sqrt(width), and one table for input and output: from the usual 0.02 and two tables so narrow a model
            # hardly starts to learn from scratch.
            "initializer_range": 0.08,
            "tie_word_embeddings": True,
        },
        "image_token": 512,
        # Tiles then show more than the thumbnail does, as they do at 336 pixels.
        "hd": {"image_size": 32},
        # A sixteenth of the queries, in windows that 8 x 8 features have.
        "cos": {"image_size": 64, "levels": (1, 2), "width": 128, "queries_divided_by": 16},
        "windows": {"cos": (1, 2, 4), "sv-cos": (1, 2, 4), "cos-336": (1, 2, 4), "cos-80": (1, 2)},
    },
    "vicuna-7b": {
        "vision": _CLIP_L_336,
        "text": {
            "vocab_size": 32064,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
        },
        "image_token": 32000,
        "cos": _COS_TOWER,
    },
    "llama3-8b": {
        "vision": _CLIP_L_336,
        "text": {
            "vocab_size": 128320,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
        },
        "image_token": 128256,
        "cos": _COS_TOWER,
    },
}


def _choose(table: dict[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise UserError(f"Unknown {what} {name!r}; known: {', '.join(table)}.")
    return table[name]


def preset_skip(preset: str, patches: int = PAPER_PATCHES) -> SkipConfig | None:
    """The `SkipConfig` of a preset for a tower of `patches` tokens a crop.

    The paper's numbers belong to 576 tokens (for `cos` to 1296 queries, whatever the tower); another tower keeps their
    proportion, rounded.

    Raises:
        UserError: an unknown preset, with the list of the known ones.
    """
    chosen = _choose(PRESETS, preset, "preset")
    if chosen.skip is None or chosen.front_end == "cos" or patches == PAPER_PATCHES:
        return chosen.skip
    scale = patches / PAPER_PATCHES
    retained = max(1, round(chosen.skip.retained * scale))
    others = patches if chosen.front_end == "hd" else patches - retained
    return replace(chosen.skip, retained=retained, skipped=max(1, min(round(chosen.skip.skipped * scale), others)))


def preset_config(preset: str, size: str = "tiny", **overrides: Any) -> LlavaSkipConfig:
    """The whole model configuration of a preset at a size.

    Args:
        preset: a key of `PRESETS`.
        size: a key of `SIZES`.
        **overrides: fields of the language model that replace those of the size (for example `vocab_size`).

    Raises:
        UserError: an unknown preset or size.
    """
    numbers = _choose(SIZES, size, "size")
    return LlavaSkipConfig(
        text_config=LlamaConfig(**{**numbers["text"], **overrides}),
        image_token_index=numbers["image_token"],
        **fields_for_tower(preset, CLIPVisionConfig(**numbers["vision"]), size),
    )


def fields_for_tower(preset: str, vision: CLIPVisionConfig, size: str = "vicuna-7b") -> dict[str, Any]:
    """The fields of a `LlavaSkipConfig` that a preset decides, for a vision tower; `cos` sets its picture size.

    Args:
        preset: a key of `PRESETS`.
        vision: of the tower.
        size: whose resampler is used, for `cos`.

    Raises:
        UserError: an unknown preset, or a tower that the resampler does not fit.
    """
    chosen, numbers = _choose(PRESETS, preset, "preset"), _choose(SIZES, size, "size")
    fields: dict[str, Any] = {"front_end": chosen.front_end, "preset": preset}
    own = numbers.get(chosen.front_end, {})
    if "image_size" in own:
        vision = CLIPVisionConfig(**vision.to_dict() | {"image_size": own["image_size"]})
    if chosen.front_end == "cos":
        cos = numbers["cos"]
        fields["resampler"] = _resampler(chosen, vision, numbers.get("windows", {}).get(preset), cos)
        skip = chosen.skip and _divide(chosen.skip, cos["queries_divided_by"])
    else:
        skip = preset_skip(preset, (vision.image_size // vision.patch_size) ** 2)
    return fields | {"vision_config": vision, "skip": None if skip is None else skip.to_dict()}


def skip_for_model(preset: str, config: LlavaSkipConfig) -> SkipConfig | None:
    """The `SkipConfig` of a preset for a model that exists: its architecture stays, its sizes are kept to.

    Raises:
        UserError: an unknown preset, or one of another architecture, whose projector would not fit.
    """
    chosen = _choose(PRESETS, preset, "preset")
    resampler = config.resampler_config
    scale = _queries_ratio(chosen, config)
    if scale is None:
        fitting = [name for name, other in PRESETS.items() if _queries_ratio(other, config)]
        queries = f" and {sum(resampler.queries)} queries" if resampler else ""
        raise UserError(
            f"The model has the front end {config.front_end!r}{queries}, the preset {preset!r} is for another one, "
            f"whose projector would not fit; presets of the model's: {', '.join(fitting)}."
        )
    if resampler:
        return None if chosen.skip is None else _divide(chosen.skip, scale)
    return preset_skip(preset, config.patches)


def _queries_ratio(preset: Preset, config: LlavaSkipConfig) -> int | None:
    """How many times the model's queries a preset has, 1 without a resampler; None: it is of another architecture."""
    if preset.front_end != config.front_end:
        return None
    if config.resampler_config is None:
        return 1
    ratio, rest = divmod(sum(preset.queries), sum(config.resampler_config.queries))
    return ratio if not rest else None


def _divide(skip: SkipConfig, by: int) -> SkipConfig:
    spans = tuple((first // by, end // by) for first, end in skip.spans)
    return replace(skip, retained=skip.retained // by, skipped=skip.skipped // by, summaries=spans)


def _resampler(
    preset: Preset, vision: CLIPVisionConfig, windows: tuple[int, ...] | None, cos: dict[str, Any]
) -> dict[str, Any]:
    side = vision.image_size // vision.patch_size
    return ResamplerConfig(
        windows=tuple(side // divisor for divisor in windows or preset.windows),
        queries=tuple(queries // cos["queries_divided_by"] for queries in preset.queries),
        levels=cos["levels"],
        width=cos["width"],
    ).to_dict()
