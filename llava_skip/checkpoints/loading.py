"""Any checkpoint into the model, with a report of what was missing, left over or resized."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from llava_skip.checkpoints import layouts
from llava_skip.checkpoints.adapters import find_projector, merge_lora, read_adapter, read_projector
from llava_skip.checkpoints.files import find_folder, load_tokenizer, read_json, read_model_weights
from llava_skip.checkpoints.joining import POSITIONS, fit_positions
from llava_skip.checkpoints.names import native_name, native_weights
from llava_skip.checkpoints.report import LoadReport
from llava_skip.configuration import LlavaSkipConfig, SkipConfig
from llava_skip.errors import UserError
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip.presets import PRESETS, fields_for_tower, front_end_of
from llava_skip.processing import find_image_token

logger = logging.getLogger(__name__)

_TOWER, _PROJECTOR, _LANGUAGE = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
_EMBEDDING, _HEAD = f"{_LANGUAGE}embed_tokens.weight", "lm_head.weight"
_TOWER_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")


def load_checkpoint(
    path: str | Path,
    preset: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    *,
    skip: SkipConfig | None = None,
    vision_tower: str | None = None,
    projector: str | Path | None = None,
    lora: str | Path | None = None,
    attn_implementation: str | None = None,
    log: bool = True,
) -> LlavaSkipForConditionalGeneration:
    """A checkpoint of any known layout (docs/checkpoints.md) as this library's model, in evaluation mode.

    With a skipping `preset` a dense checkpoint skips at once: its summary layer starts anew. What happened to the
    tensors is in `model.load_report`.

    Args:
        path: folder or hub name.
        preset: a key of `PRESETS`; None keeps what the checkpoint has.
        dtype: of the model; None keeps the checkpoint's.
        skip: the numbers themselves, in the place of a preset.
        vision_tower: folder or hub name of the CLIP tower, if it is not in the checkpoint and not where that says.
        projector: a `mm_projector.bin`, or its folder.
        lora: folder of a LoRA adapter, which is merged.
        attn_implementation: as in `from_pretrained`.
        log: log the report if there is anything to tell.

    Raises:
        MissingFileError: a file is missing.
        UserError: an unknown layout, or weights that do not fit: all of them are listed.
        MissingPackageError: a package that a LoRA adapter or a tokenizer needs is not installed.
    """
    if preset and skip:
        raise UserError("Give preset or skip, not both.")
    folder, report = find_folder(path), LoadReport(str(path))
    adapter = find_folder(lora) if lora else None
    raw, weights, factors, own_tower = _read(folder, adapter, find_projector(projector) if projector else None, report)
    config, weights = _configure(folder, raw, weights, (preset, skip, vision_tower), own_tower, report)
    config._attn_implementation = attn_implementation
    _fit(weights, config, report)
    _check(weights, config, report, new_projector=report.layout == layouts.LANGUAGE and not projector)
    unused = set(report.unused)
    kept = {name: tensor for name, tensor in weights.items() if name not in unused}
    report.loaded = len(kept)
    model = _build(config, kept, dtype or weights[_EMBEDDING].dtype)
    if adapter:
        merge_lora(model, adapter, factors)
        report.notes.append(f"LoRA adapter of {lora} merged into {len(factors) // 2} modules.")
    _set_stop_tokens(model, folder)
    model.load_report = report
    if log and not report.is_exact:
        logger.warning("%s", report)
    return model.eval()


def _read(
    folder: Path, adapter: Path | None, projector: Path | None, report: LoadReport
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor], bool]:
    """config.json, weights under native names, low-rank factors, and whether the tower is the paper's own CLIP.

    A projector's or an adapter's folder over a plain language model has LLaVA's settings in its own config.json.
    """
    raw = read_json(folder / "config.json")
    report.layout = layouts.detect_layout(raw)
    stored = read_model_weights(folder)
    if projector:
        added = read_projector(projector, report)
        stale = [name for name in stored if native_name(name).startswith(_PROJECTOR)]
        report.notes.append(f"projector of {projector}, {len(added)} tensors, in the place of {len(stale)}.")
        stored = {name: tensor for name, tensor in stored.items() if name not in stale} | added
    own_tower = "model.vision_tower.conv1.weight" in stored
    weights = native_weights(stored)
    factors: dict[str, Tensor] = {}
    if adapter:
        factors, whole = read_adapter(adapter)
        own_tower = own_tower or f"{_TOWER}conv1.weight" in whole
        weights |= whole
    if report.layout == layouts.LANGUAGE:
        beside = [other / "config.json" for other in (adapter, projector and projector.parent) if other]
        for file in beside:
            if file.is_file() and layouts.detect_layout(theirs := read_json(file)) == layouts.ORIGINAL:
                raw, report.layout = theirs, layouts.ORIGINAL
                report.notes.append(f"settings of {file}.")
                break
    return raw, weights, factors, own_tower


def _configure(
    folder: Path,
    raw: dict[str, Any],
    weights: dict[str, Tensor],
    wanted: tuple[str | None, SkipConfig | None, str | None],
    own_tower: bool,
    report: LoadReport,
) -> tuple[LlavaSkipConfig, dict[str, Tensor]]:
    """The model's configuration, and its weights with those of the tower if it lies elsewhere."""
    preset, skip, vision_tower = wanted
    if report.layout in (layouts.ORIGINAL, layouts.LANGUAGE):
        text = layouts.text_config(raw)
        image_token = _make_room(text, weights, folder)
        vision, tower = _tower(folder, raw, weights, vision_tower, own_tower, report)
        weights = weights | tower
        if report.layout == layouts.LANGUAGE and preset in PRESETS and not front_end_of(preset).llava_projector:
            fields = fields_for_tower(preset, vision)  # the resampler starts anew: the preset makes it
            return LlavaSkipConfig(text_config=text, image_token_index=image_token, **fields), weights
        _express_linear(weights, raw, report)
        config = layouts.flat_config(raw, text, vision, weights, image_token, own_tower, report)
    else:
        if vision_tower:
            raise UserError(f"{folder} has a vision tower of its own (layout {report.layout}): leave vision_tower out.")
        config = LlavaSkipConfig.from_dict(raw) if report.layout == layouts.NATIVE else layouts.hf_config(raw)
        if report.layout == layouts.LLAVA_NEXT:
            report.notes.append("LlavaNext cuts pictures to tiles with image_newline; here a picture is one crop.")
    summary = any(name.startswith("model.summary.") for name in weights)
    return layouts.with_skip(config, preset, skip, raw, summary, report), weights


def _make_room(text: Any, weights: dict[str, Tensor], folder: Path) -> int:
    """Enlarge the vocabulary, to a multiple of 64, so that the image token has an id; returns the id."""
    if _EMBEDDING not in weights:
        raise UserError("The checkpoint has no embedding of the language model: is it a whole model?")
    text.vocab_size = weights[_EMBEDDING].shape[0]
    tokenizer = load_tokenizer(folder, text)
    image_token = text.vocab_size if tokenizer is None else find_image_token(tokenizer)
    last = max(text.vocab_size, image_token + 1, 0 if tokenizer is None else len(tokenizer))
    text.vocab_size = -(-last // 64) * 64
    return image_token


def _tower(
    folder: Path,
    raw: dict[str, Any],
    weights: dict[str, Tensor],
    vision_tower: str | None,
    own_tower: bool,
    report: LoadReport,
) -> tuple[Any, dict[str, Tensor]]:
    """Configuration of the tower, and its weights (native names) if the checkpoint does not hold them."""
    held = any(name.startswith(_TOWER) for name in weights)
    source = layouts.find_tower(raw, vision_tower, folder)
    if own_tower:
        return layouts.tower_config_of_weights(weights), {}
    if held and not vision_tower and not (source and Path(source).is_dir()):
        report.notes.append(f"The tower {source} is no folder: its sizes are read from its weights, heads of 64.")
        return layouts.tower_config_of_weights(weights), {}
    if source is None:
        raise UserError(f"{folder} holds no vision tower and names none: give vision_tower.")
    config = layouts.tower_config(source)
    if held:
        return config, {}
    stored = {name.removeprefix("vision_model."): t for name, t in read_model_weights(find_folder(source)).items()}
    tower = {f"{_TOWER}{name}": tensor for name, tensor in stored.items() if name.startswith(_TOWER_PARTS)}
    report.notes.append(
        f"vision tower of {source}, {len(tower)} tensors of {len(stored)} (the rest is CLIP's text side)."
    )
    return config, tower


def _express_linear(weights: dict[str, Tensor], raw: dict[str, Any], report: LoadReport) -> None:
    """A linear projector is the model's two layers with no activation between them, the second the identity."""
    if "model.mm_projector.weight" not in weights:
        if raw.get("mm_projector_type") == "linear":
            raise UserError("mm_projector_type is 'linear', but there is no model.mm_projector.weight.")
        return
    first = weights.pop("model.mm_projector.weight")
    width = first.shape[0]
    weights[f"{_PROJECTOR}linear_1.weight"] = first
    weights[f"{_PROJECTOR}linear_1.bias"] = weights.pop("model.mm_projector.bias")
    weights[f"{_PROJECTOR}linear_2.weight"] = torch.eye(width, dtype=first.dtype)
    weights[f"{_PROJECTOR}linear_2.bias"] = torch.zeros(width, dtype=first.dtype)
    raw["mm_projector_type"] = "linear"
    report.notes.append("The linear projector is linear_1; linear_2 is the identity, without activation between them.")


def _fit(weights: dict[str, Tensor], config: LlavaSkipConfig, report: LoadReport) -> None:
    """Resize the tower's position table, and append rows for new tokens to the vocabulary's tables."""
    rows = config.text_config.vocab_size
    if (change := fit_positions(weights, config.vision_config)) is not None:
        report.reshaped.append(f"{POSITIONS}: {change[0]} -> {change[1]} rows, bicubic")
    if report.layout not in (layouts.ORIGINAL, layouts.LANGUAGE):
        return  # their vocabulary is settled
    for name in (_EMBEDDING, _HEAD):
        if (table := weights.get(name)) is not None and table.shape[0] < rows:
            # The mean of all rows: in the head it can never give a new token the largest logit.
            mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
            weights[name] = torch.cat([table, mean.expand(rows - table.shape[0], -1)])
            report.reshaped.append(f"{name}: {table.shape[0]} -> {rows} rows, the new ones the mean")


def _check(weights: dict[str, Tensor], config: LlavaSkipConfig, report: LoadReport, new_projector: bool) -> None:
    """Fill the report's lists; raise UserError for whatever would change what the checkpoint computes."""
    with torch.device("meta"):
        model = LlavaSkipForConditionalGeneration(config)
    own = model.state_dict()
    tied = set(model.all_tied_weights_keys)
    optional = ["model.summary.", *_unused_tower(config), *([_PROJECTOR] if new_projector else [])]
    absent = [name for name in own if name not in weights and name not in tied]
    report.fresh += [name for name in absent if name.startswith(tuple(optional))]
    unknown = [name for name in weights if name not in own]
    essential = [name for name in unknown if name.startswith((_LANGUAGE, _HEAD))]
    report.unused += [name for name in unknown if name not in essential]
    missing = [name for name in absent if name not in report.fresh]
    shapes = [
        f"{name} is {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
        for name, tensor in weights.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if _HEAD in tied and _HEAD in weights and not torch.equal(weights[_HEAD], weights[_EMBEDDING]):
        shapes.append(f"{_HEAD} differs from the embedding, although tie_word_embeddings is true")
    if missing or essential or shapes:
        raise UserError(
            f"{report.source} (layout {report.layout}) does not fit the model of its config.json. Missing: {missing}. "
            f"Unknown: {essential}. Shape: {shapes}. Not used: {report.unused}."
        )


def _unused_tower(config: LlavaSkipConfig) -> list[str]:
    """Prefixes of the tower's weights behind the features that are used: files may leave them out."""
    unused = range(config.used_tower_layers, config.vision_config.num_hidden_layers)
    return [f"{_TOWER}post_layernorm.", *(f"{_TOWER}encoder.layers.{index}." for index in unused)]


def _build(
    config: LlavaSkipConfig, weights: dict[str, Tensor], dtype: torch.dtype
) -> LlavaSkipForConditionalGeneration:
    with _quiet():  # transformers prints a report of its own
        return LlavaSkipForConditionalGeneration.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _set_stop_tokens(model: LlavaSkipForConditionalGeneration, folder: Path) -> None:
    """The ids that begin, end and pad; sampling settings that a folder may hold are those of another program."""
    text, saved = model.config.text_config, folder / "generation_config.json"
    ids = read_json(saved) if saved.is_file() else {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: ids.get(name, getattr(text, name, None)) for name in names})
