"""The sizes that presets come in: widths of the vision tower and the language model, and of the front ends' own parts.

`vision` and `text` are fields of transformers' configurations. The entry of a front end has what it needs at this size:
`image_size` of its tower, and for `cos` the resampler's numbers.
"""

from __future__ import annotations

from typing import Any

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
            # hardly starts to train from scratch.
            "initializer_range": 0.08,
            "tie_word_embeddings": True,
        },
        "image_token": 512,
        # Tiles then show more than the thumbnail does, as they do at 336 pixels.
        "hd": {"image_size": 32},
        # A sixteenth of the queries, in windows that 8 x 8 features have.
        "cos": {
            "image_size": 64,
            "levels": (1, 2),
            "width": 128,
            "queries_divided_by": 16,
            "windows": {"cos": (1, 2, 4), "sv-cos": (1, 2, 4), "cos-336": (1, 2, 4), "cos-80": (1, 2)},
        },
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

PUBLISHED: dict[str, str] = {
    "lmsys/vicuna-7b-v1.5": "vicuna-7b",
    "liuhaotian/llava-v1.5-7b": "vicuna-7b",
    "llava-hf/llava-1.5-7b-hf": "vicuna-7b",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama3-8b",
    "unsloth/llama-3-8b-Instruct": "llama3-8b",
}
"""Published models, by their names on the hub -> their size: what they cost is known without a file of theirs."""
