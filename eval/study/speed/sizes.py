"""Sizes that `bench` measures beside those of the presets: true numbers of image tokens, at widths for a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.presets import config_at
from llava_skip.sizes import SIZES
from llava_skip_base.errors import UserError


def _narrow(width: int, layers: int, levels: tuple[int, int]) -> dict[str, Any]:
    """LLaMA3's proportions: key-value heads a quarter of the heads, FFN 3.5 and a tower a quarter as wide."""
    tower = width // 4
    return {
        "vision": {
            "hidden_size": tower,
            "intermediate_size": 4 * tower,
            "num_hidden_layers": levels[1] + 2,
            "num_attention_heads": tower // 64,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": tower,
        },
        "text": {
            "vocab_size": 2048,
            "hidden_size": width,
            "intermediate_size": 7 * width // 2,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "num_key_value_heads": width // 256,
            "max_position_embeddings": 32768,
        },
        "image_token": 2047,
        "cos": {"image_size": 448, "levels": levels, "width": tower, "queries_divided_by": 1},
    }


BENCH_SIZES: dict[str, Mapping[str, Any]] = {
    "width-512": _narrow(512, 4, (1, 2)),
    "width-1024": _narrow(1024, 6, (2, 3)),
    **SIZES,
}
"""Name -> widths, as in `llava_skip.sizes.SIZES`."""


def bench_config(preset: str, size: str) -> LlavaSkipConfig:
    """The configuration of a preset at a size of `BENCH_SIZES`.

    Raises:
        UserError: an unknown preset or size.
    """
    if size not in BENCH_SIZES:
        raise UserError(f"--size is {size!r}; known: {', '.join(BENCH_SIZES)}.")
    return config_at(preset, BENCH_SIZES[size])
