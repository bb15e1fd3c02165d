"""Named presets: the models of the paper's tables, at the sizes that the project runs them in."""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig

from llava_skip.configuration import LlavaSkipConfig, SkipConfig

PAPER_PATCHES = 576
"""Visual tokens of CLIP-L/14 at 336 pixels, to which the R and S of the paper belong."""

PRESETS: dict[str, SkipConfig | None] = {
    "llava": None,
    "sv-llava-64": SkipConfig(retained=64, skipped=156),  # paper, table 2
    "sv-llava-100": SkipConfig(retained=100, skipped=156),  # paper, table 1
    "sv-llava-256": SkipConfig(retained=256, skipped=320),  # paper, table 1
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
    },
}


def _choose(table: dict[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise ValueError(f"Unknown {what} {name!r}; known: {', '.join(table)}.")
    return table[name]


def preset_skip(preset: str, patches: int = PAPER_PATCHES) -> SkipConfig | None:
    """The `SkipConfig` of a preset for a tower of `patches` tokens a picture.

    The paper's numbers belong to 576 tokens; another tower keeps their proportion, rounded.

    Raises:
        ValueError: an unknown preset, with the list of the known ones.
    """
    skip = _choose(PRESETS, preset, "preset")
    if skip is None or patches == PAPER_PATCHES:
        return skip
    scale = patches / PAPER_PATCHES
    retained = max(1, round(skip.retained * scale))
    skipped = max(1, min(round(skip.skipped * scale), patches - retained))
    return SkipConfig(retained=retained, skipped=skipped, forget_cache=skip.forget_cache)


def preset_config(preset: str, size: str = "tiny", **overrides: Any) -> LlavaSkipConfig:
    """The whole model configuration of a preset at a size.

    Args:
        preset: a key of `PRESETS`.
        size: a key of `SIZES`.
        **overrides: fields of the language model that replace those of the size (for example `vocab_size`).

    Raises:
        ValueError: an unknown preset or size.
    """
    numbers = _choose(SIZES, size, "size")
    vision = CLIPVisionConfig(**numbers["vision"])
    skip = preset_skip(preset, (vision.image_size // vision.patch_size) ** 2)
    return LlavaSkipConfig(
        vision_config=vision,
        text_config=LlamaConfig(**{**numbers["text"], **overrides}),
        image_token_index=numbers["image_token"],
        skip=None if skip is None else skip.to_dict(),
        preset=preset,
    )
