"""From a config.json of any layout to this library's configuration."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CONFIG_MAPPING, CLIPConfig, CLIPVisionConfig, LlavaConfig, PreTrainedConfig

from llava_skip.checkpoints.files import find_folder
from llava_skip.checkpoints.names import LINEAR_PROJECTOR, POSITIONS, PROJECTOR, TOWER
from llava_skip.checkpoints.report import LoadReport
from llava_skip.checkpoints.schema import make_config, read_config
from llava_skip.configuration import LlavaSkipConfig, SkipConfig
from llava_skip.decoder import LANGUAGE_MODELS
from llava_skip.presets import PRESETS, front_end_of, skip_for_model
from llava_skip.vision import get_front_end
from llava_skip.vision.resampler import ResamplerConfig
from llava_skip_base.errors import UserError
from llava_skip_base.texts import shortened

NATIVE, ORIGINAL, LANGUAGE = "native", "original LLaVA", "language model"
LLAVA_HF, LLAVA_NEXT = "llava-hf", "LlavaNext"

_ORIGINAL_CLASS = re.compile(r"^Llava(\w+)ForCausalLM$")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_PROJECTORS = ("mlp2x_gelu", "linear", "cos", "chain-of-sight", None)
_NOT_OF_THE_TEXT = re.compile(
    r"^(mm_|use_mm_|tune_|freeze_|unfreeze_|s2|use_hd$|use_zip$|cos_config|backbone_resolution|delay_load|image_|"
    r"tokenizer_|architectures$|model_type$|auto_map$|transformers_version$|_name_or_path$|torch_dtype$|dtype$)"
)


def detect_layout(raw: Mapping[str, Any]) -> str:
    """The layout that a config.json belongs to.

    LLaVA's own is recognised before `model_type` is looked at: released files say `llava`, which transformers takes for
    its own class, with the sizes of a 7B model whatever the file says.

    Raises:
        UserError: an unknown layout.
    """
    kind, classes = raw.get("model_type"), raw.get("architectures") or []
    if kind == LlavaSkipConfig.model_type:
        return NATIVE
    if "text_config" in raw and kind in ("llava", "llava_next"):
        return LLAVA_HF if kind == "llava" else LLAVA_NEXT
    if "text_config" not in raw:
        if any(name.startswith("mm_vision_tower") for name in raw) or any(
            _ORIGINAL_CLASS.match(name) for name in classes
        ):
            return ORIGINAL
        if kind in CONFIG_MAPPING and kind != "llava" and "hidden_size" in raw:
            return LANGUAGE
    raise UserError(
        f"The config.json (model_type {kind!r}, architectures {classes}) is of no known layout: it is neither "
        f"{NATIVE}, nor {LLAVA_HF} or {LLAVA_NEXT} (text_config), nor {ORIGINAL} (mm_vision_tower), nor a "
        "language model."
    )


def text_config(raw: Mapping[str, Any], kind: str | None = None) -> PreTrainedConfig:
    """The language model's configuration from a flat config.json, LLaVA's own or a plain language model's.

    Args:
        raw: the config.json.
        kind: the type of the language model; None takes what the config.json says.

    Raises:
        UserError: a size is missing (defaults would be those of another model), or an unknown kind.
    """
    if absent := [name for name in _SIZES if name not in raw]:
        raise UserError(f"The config.json lacks {absent}; sizes are never guessed.")
    kind = kind or _language_model_type(raw)
    if kind not in LANGUAGE_MODELS:
        seen = f"{shortened(repr(kind))} (architectures {shortened(raw.get('architectures'), 200)})"
        raise UserError(
            f"The language model of the config.json is of the unknown type {seen}: if it is one of "
            f"{', '.join(LANGUAGE_MODELS)} under another name, as in "
            "ShareGPT4V, MGM, Bunny or Cambrian, say so with --language-model-type."
        )
    fields = {key: value for key, value in raw.items() if not _NOT_OF_THE_TEXT.match(key)}
    return make_config(CONFIG_MAPPING[kind], fields, "The config.json")


def _language_model_type(raw: Mapping[str, Any]) -> str:
    kinds = [(raw.get("model_type") or "").removeprefix("llava_")]
    kinds += [found[1].lower() for name in raw.get("architectures") or [] if (found := _ORIGINAL_CLASS.match(name))]
    # "llava" alone does not say which language model it is; the class does, if it is one of LLaVA's.
    known = [{"qwen": "qwen2"}.get(kind, kind) for kind in kinds if kind != "llava"] or ["llama"]
    return known[-1] if known[-1] in CONFIG_MAPPING else known[0]


def tower_config(source: str) -> CLIPVisionConfig:
    """Configuration of a CLIP folder or hub name: of its vision side, if it holds both.

    Raises:
        MissingFileError: no such folder.
        UserError: another kind of tower.
    """
    folder = find_folder(source, "vision tower", weights=False)
    return clip_config(read_config(folder), f"The vision tower {source}")


def clip_config(raw: Mapping[str, Any], where: str) -> CLIPVisionConfig:
    """Configuration of a CLIP tower from its config.json, from that of a whole CLIP, or of a model that has the tower.

    Raises:
        UserError: another kind of tower.
    """
    kind = raw.get("model_type")
    if kind == "clip":
        return make_config(CLIPConfig, raw, where).vision_config
    own = raw.get("vision_config")
    if kind in (LlavaSkipConfig.model_type, "llava", "llava_next") and isinstance(own, dict):
        return clip_config(own, f"{where}'s tower")
    if kind != "clip_vision_model":
        raise UserError(f"{where} is a {kind} model: give a CLIP tower, such as openai/clip-vit-large-patch14-336.")
    return make_config(CLIPVisionConfig, raw, where)


def tower_config_of_weights(weights: Mapping[str, Tensor]) -> CLIPVisionConfig:
    """Configuration of an OpenAI tower from the shapes of its weights (native names): heads of 64, QuickGELU."""
    width = weights[f"{TOWER}embeddings.class_embedding"].shape[0]
    side = weights[f"{TOWER}embeddings.patch_embedding.weight"].shape[-1]
    layers = {int(found[1]) for name in weights if (found := re.match(rf"{TOWER}encoder\.layers\.(\d+)\.", name))}
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=weights[f"{TOWER}encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=max(1, width // 64),
        patch_size=side,
        image_size=side * _grid(weights),
        hidden_act="quick_gelu",
    )


def _grid(weights: Mapping[str, Tensor]) -> int:
    """Patches on a side of the image that the tower's position table is for."""
    return round((weights[POSITIONS].shape[0] - 1) ** 0.5)


def flat_config(
    raw: Mapping[str, Any],
    text: PreTrainedConfig,
    vision: CLIPVisionConfig,
    weights: Mapping[str, Tensor],
    image_token: int,
    own_tower: bool,
    report: LoadReport,
) -> LlavaSkipConfig:
    """The configuration of a model in LLaVA's own layout, or of a language model with a tower; dense.

    Args:
        raw: its config.json.
        text: of the language model, with room for the image token in its vocabulary.
        vision: of the tower.
        weights: by native name, before a linear projector is changed; at least those of projector and summary layer.
        image_token: id of the placeholder.
        own_tower: whether the tower is the paper's own CLIP.
        report: what is inferred is noted there.

    Raises:
        UserError: a setting that the weights contradict.
    """
    if (resolution := raw.get("backbone_resolution", -1)) > 0:
        vision.image_size = resolution
    elif POSITIONS in weights:  # says what the tower was trained at; its configuration may say what it was made from
        vision.image_size = vision.patch_size * _grid(weights)
    resampler = _resampler(raw.get("cos_config_version"), weights, own_tower, report)
    return LlavaSkipConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        # The paper's own CLIP has no 24th block: its last one is what -2 means elsewhere.
        vision_feature_layer=-1 if own_tower else raw.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if raw.get("mm_vision_select_feature") == "cls_patch" else "default",
        projector_hidden_act="linear" if LINEAR_PROJECTOR in weights else "gelu",
        front_end="cos" if resampler else "hd" if raw.get("use_hd") else "llava",
        resampler=resampler.to_dict() if resampler else None,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def check_settings(raw: Mapping[str, Any], report: LoadReport) -> None:
    """Note the settings of a flat config.json that have no counterpart here.

    Raises:
        UserError: a setting that the model cannot express.
    """
    kind = raw.get("mm_projector_type", "mlp2x_gelu")
    if kind not in _PROJECTORS:
        raise UserError(f"mm_projector_type is {kind!r}; the model has mlp2x_gelu, linear and the chain-of-sight one.")
    if raw.get("s2"):
        raise UserError("s2 is set: the multi-scale tower is not supported.")
    if raw.get("mm_use_im_start_end"):
        report.notes.append("mm_use_im_start_end is true: prompts here do not put those tokens around an image.")
    if (merge := raw.get("mm_patch_merge_type", "flat")) != "flat":
        report.notes.append(
            f"mm_patch_merge_type {merge!r} is not followed: one crop for each image, no image_newline."
        )
    if (ratio := raw.get("image_aspect_ratio", "pad")) != "pad":
        report.notes.append(f"image_aspect_ratio is {ratio!r}; the processor here pads images to a square.")


def _resampler(
    version: str | None, weights: Mapping[str, Tensor], own_tower: bool, report: LoadReport
) -> ResamplerConfig | None:
    """The resampler that the names of the weights describe; None without one.

    The order of the scales, which is the order of the visual tokens, is in the version's name: it lists the numbers of
    queries (`..._q16+256+1024`). Among scales with the same number the larger window is first.
    """
    names = [name for name in weights if name.startswith(f"{PROJECTOR}scales.")]
    if not names:
        return None
    found = {(int(w), int(q)) for name in names for w, q in re.findall(r"\.w(\d+)_q(\d+)\.", name)}
    scales = sorted(found, key=lambda scale: -scale[0])
    counts = re.search(r"_q(\d+(?:\+\d+)*)$", version or "")
    if counts:
        order = [int(count) for count in counts[1].split("+")]
        if sorted(order) != sorted(queries for _, queries in scales):
            raise UserError(f"cos_config_version is {version!r}, but the weights have the (window, queries) {scales}.")
        scales.sort(key=lambda scale: order.index(scale[1]))
        if len(set(order)) < len(order):  # equal counts need not be neighbours
            left = list(scales)
            scales = [left.pop(next(i for i, s in enumerate(left) if s[1] == count)) for count in order]
    elif version is None:
        report.notes.append("No cos_config_version: the resampler's scales are taken from coarse to fine.")
    return ResamplerConfig(
        windows=tuple(window for window, _ in scales),
        queries=tuple(queries for _, queries in scales),
        levels=tuple(sorted({int(level) for name in names for level in re.findall(r"\.readers\.l(\d+)\.", name)})),
        # Blocks of the own CLIP are counted from 0; the first of transformers' hidden states is the embedding.
        level_offset=1 if own_tower else 0,
        width=next(weights[name].shape[-1] for name in names if name.endswith(".query")),
    )


def hf_config(raw: Mapping[str, Any]) -> LlavaSkipConfig:
    """The configuration of a llava-hf or LlavaNext model; dense."""
    fields = {key: raw[key] for key in raw if key not in ("model_type", "image_grid_pinpoints")} | parts(raw)
    theirs = make_config(LlavaConfig, fields, "The config.json").to_dict()
    known = ["text_config", "vision_config", "image_token_index", "projector_hidden_act", "vision_feature_layer"]
    known += ["vision_feature_select_strategy", "multimodal_projector_bias", "tie_word_embeddings"]
    return LlavaSkipConfig(**{key: theirs[key] for key in known})


def native_config(raw: Mapping[str, Any]) -> LlavaSkipConfig:
    """The configuration of a native model."""
    fields = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map")} | parts(raw)
    return make_config(LlavaSkipConfig, fields, "The config.json")


def parts(raw: Mapping[str, Any]) -> dict[str, PreTrainedConfig]:
    """The configurations of the language model and the tower, from a config.json that has an object for each.

    Raises:
        UserError: one is missing, or of an unknown type.
    """
    if absent := [name for name in ("text_config", "vision_config") if raw.get(name) is None]:
        raise UserError(f"The config.json lacks {' and '.join(absent)}; sizes are never guessed.")
    text, vision = raw["text_config"], raw["vision_config"]
    kind = text.get("model_type", "llama")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"The text_config of the config.json is of the unknown type {shortened(repr(kind))}.")
    vision = {"model_type": "clip_vision_model", **vision}
    return {
        "text_config": make_config(CONFIG_MAPPING[kind], text, "The text_config of the config.json"),
        "vision_config": clip_config(vision, "The vision_config of the config.json"),
    }


def check_ids(config: LlavaSkipConfig) -> None:
    """Raise UserError if an id that the model itself looks up is outside of its vocabulary."""
    rows, pad = config.text_config.vocab_size, config.text_config.pad_token_id
    for name, value in (("image_token_index", config.image_token_id), ("pad_token_id", pad)):
        if value is not None and not (0 if name == "image_token_index" else -rows) <= value < rows:
            raise UserError(
                f"{name} is {value}, but vocab_size is {rows}: one of them is not that of the model's weights."
            )


def with_skip(
    config: LlavaSkipConfig,
    preset: str | None,
    skip: SkipConfig | None,
    raw: Mapping[str, Any],
    summary: bool,
    report: LoadReport,
) -> LlavaSkipConfig:
    """The configuration with the preset or numbers that were asked for, or with the checkpoint's own.

    Args:
        config: read from the checkpoint.
        preset: name of a preset.
        skip: the numbers themselves, instead of a preset.
        raw: the config.json.
        summary: whether the checkpoint holds a summary layer.
        report: what is inferred is noted there.

    Raises:
        UserError: a preset that does not fit, or a summary layer without the numbers of tokens that skip.
    """
    if not preset and not skip and (not summary or config.skip is not None):
        return config
    if not preset and not skip:
        if not (raw.get("use_zip") or raw.get("use_hd")):
            raise UserError(
                "The checkpoint holds a summary layer (model.ada), but its config.json does not say how many tokens "
                "skip: name the preset (sv-llava-...) or give skip."
            )
        preset = "sv-llava-hd" if raw.get("use_hd") else "sv-llava-100"  # the numbers in the paper's code
        report.notes.append(f"The checkpoint skips, and does not say how many tokens: preset {preset}.")
    fields = config.to_dict() | {"preset": preset, "skip": None}
    if preset in PRESETS and front_end_of(preset).llava_projector and get_front_end(config.front_end).llava_projector:
        fields["front_end"] = front_end_of(preset).name  # both have the same weights
    chosen = skip if preset is None else skip_for_model(preset, LlavaSkipConfig(**fields))
    return LlavaSkipConfig(**fields | {"skip": None if chosen is None else chosen.to_dict()})


def find_tower(raw: Mapping[str, Any], vision_tower: str | None, folder: Path) -> str | None:
    """Where the vision tower is: what was asked for, else what the config.json names; None if neither."""
    named = vision_tower or raw.get("mm_vision_tower")
    if isinstance(named, list) and len(named) <= 1:
        named = named[0] if named else None
    if named is not None and not isinstance(named, str):
        raise UserError(
            f"mm_vision_tower is {shortened(repr(named))}; the model has one CLIP tower: name it by a text."
        )
    # os.path: a name that no file can have exists nowhere
    if named and not vision_tower and not os.path.exists(os.path.expanduser(named)) and os.path.isdir(folder / named):
        return str(folder / named)
    return named
