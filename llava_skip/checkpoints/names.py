"""Names of weights in other layouts -> names in this library."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from llava_skip_base.errors import UserError

TOWER, PROJECTOR, LANGUAGE_MODEL = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
"""How the names of a part's weights begin in this library."""
EMBEDDING, HEAD = f"{LANGUAGE_MODEL}embed_tokens.weight", "lm_head.weight"
"""The two tables of the vocabulary."""
POSITIONS = f"{TOWER}embeddings.position_embedding.weight"
"""The tower's position table."""
LINEAR_PROJECTOR = "model.mm_projector.weight"
"""LLaVA's name of a projector that is a single layer."""

_BLOCK = r"^model\.vision_tower\.transformer\.resblocks\.(\d+)\."

# The first rule that fits is used. A name means the same in every layout that has it, so one table is enough for all of
# them, and a file that mixes layouts (as transformers 5 writes) is read too.
_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # LLaVA's own code, and the paper's, which adds `ada`.
        (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", TOWER),
        (r"^model\.mm_projector\.0\.", f"{PROJECTOR}linear_1."),
        (r"^model\.mm_projector\.2\.", f"{PROJECTOR}linear_2."),
        (r"^model\.ada\.0\.", "model.summary.norm."),
        (r"^model\.ada\.1\.", "model.summary.score."),
        (r"^model\.(embed_tokens|layers|norm)\.", rf"{LANGUAGE_MODEL}\1."),
        # The paper's own CLIP; its fused q, k and v are split by `_split_attention`.
        (r"^model\.vision_tower\.conv1\.", f"{TOWER}embeddings.patch_embedding."),
        (r"^model\.vision_tower\.class_embedding$", f"{TOWER}embeddings.class_embedding"),
        (r"^model\.vision_tower\.positional_embedding$", f"{TOWER}embeddings.position_embedding.weight"),
        (r"^model\.vision_tower\.ln_pre\.", f"{TOWER}pre_layrnorm."),
        (rf"{_BLOCK}attn\.out_proj\.", rf"{TOWER}encoder.layers.\1.self_attn.out_proj."),
        (rf"{_BLOCK}ln_([12])\.", rf"{TOWER}encoder.layers.\1.layer_norm\2."),
        (rf"{_BLOCK}mlp\.c_fc\.", rf"{TOWER}encoder.layers.\1.mlp.fc1."),
        (rf"{_BLOCK}mlp\.c_proj\.", rf"{TOWER}encoder.layers.\1.mlp.fc2."),
        # The paper's chain-of-sight resampler.
        (r"^model\.mm_projector\.cls_token_(w\d+_q\d+)$", rf"{PROJECTOR}scales.\1.query"),
        (r"^model\.mm_projector\.attn_0_(w\d+)_l(\d+)_(q\d+)\.", rf"{PROJECTOR}scales.\1_\3.readers.l\2.attention."),
        (r"^model\.mm_projector\.ln_0_(w\d+)_l(\d+)_(q\d+)\.", rf"{PROJECTOR}scales.\1_\3.readers.l\2.mlp_norm."),
        (r"^model\.mm_projector\.mlp_0_(w\d+)_l(\d+)_(q\d+)\.", rf"{PROJECTOR}scales.\1_\3.readers.l\2.mlp."),
        (r"^model\.mm_projector\.(ln_out|out_proj)\.", rf"{PROJECTOR}\1."),
        # llava-hf and LlavaNext: as on the hub, as transformers 5 writes them, and in memory.
        (r"^language_model\.model\.", LANGUAGE_MODEL),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(model\.)?vision_tower\.vision_model\.", TOWER),
        (r"^vision_tower\.", TOWER),
        (r"^multi_modal_projector\.", PROJECTOR),
        (r"^image_newline$", "model.image_newline"),
    )
)

_FUSED_ATTENTION = re.compile(rf"{_BLOCK}attn\.in_proj_(weight|bias)$")


def native_name(original: str) -> str:
    """The name in this library of a weight of any known layout; names that no rule knows stay as they are."""
    for pattern, replacement in _RULES:
        if pattern.match(original):
            return pattern.sub(replacement, original)
    return original


def native_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of any known layout under native names.

    `rotary_emb.inv_freq` of old files is left out: it is computed from the configuration.

    Raises:
        UserError: two tensors have the same native name.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue
        for native, part in (_split_attention(name, tensor) or {native_name(name): tensor}).items():
            if native in result:
                raise UserError(f"Two tensors of the checkpoint are {native}; one of them is {name}.")
            result[native] = part
    return result


def _split_attention(name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """The query, key and value thirds of a fused projection of the paper's own CLIP; None for other tensors."""
    found = _FUSED_ATTENTION.match(name)
    if found is None:
        return None
    prefix = f"{TOWER}encoder.layers.{found[1]}.self_attn."
    return {f"{prefix}{part}_proj.{found[2]}": third for part, third in zip("qkv", tensor.chunk(3), strict=True)}
