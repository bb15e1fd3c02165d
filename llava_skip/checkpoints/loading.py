"""Load a checkpoint of any layout, with a report of what was missing, not used or resized."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

import llava_skip.checkpoints.layouts as layouts
from llava_skip.checkpoints.adapters import merge_lora
from llava_skip.checkpoints.files import find_folder, read_model_shapes, read_model_weights
from llava_skip.checkpoints.names import (
    EMBEDDING,
    HEAD,
    LANGUAGE_MODEL,
    LINEAR_PROJECTOR,
    POSITIONS,
    PROJECTOR,
    TOWER,
    native_name,
    native_weights,
)
from llava_skip.checkpoints.report import LoadReport
from llava_skip.checkpoints.sources import Source, configure, open_source
from llava_skip.configuration import LlavaSkipConfig, SkipConfig
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip.reduction.config import ReductionConfig
from llava_skip.vision.clip import resize_positions
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json
from llava_skip_base.texts import plain

logger = logging.getLogger(__name__)

_TOWER_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")


def load_checkpoint(
    path: str | Path,
    preset: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    *,
    skip: SkipConfig | None = None,
    config: LlavaSkipConfig | None = None,
    vision_tower: str | None = None,
    projector: str | Path | None = None,
    lora: str | Path | None = None,
    language_model_type: str | None = None,
    attn_implementation: str | None = None,
    reduction: ReductionConfig | None = None,
    log: bool = True,
) -> LlavaSkipForConditionalGeneration:
    """A checkpoint of any known layout (docs/checkpoints.md) as this library's model, in evaluation mode.

    With a skipping `preset` a dense checkpoint gets a new summary layer. `model.load_report` lists what did not fit.

    Args:
        path: folder or hub name.
        preset: a key of `PRESETS`.
        dtype: of the model; None keeps the checkpoint's.
        skip: the numbers themselves, instead of a preset.
        config: the whole configuration, from `load_config`, instead of a preset.
        vision_tower: folder or hub name of the CLIP tower, if it is not in the checkpoint and not where that says.
        projector: a `mm_projector.bin`, or its folder.
        lora: folder of a LoRA adapter, which is merged.
        language_model_type: of the language model, such as `llama`, if its family gives the type another name.
        attn_implementation: as in `from_pretrained`.
        reduction: a rival method, without `config`; None keeps what the checkpoint has.
        log: log the report unless the checkpoint fits exactly.

    Raises:
        MissingFileError: a file is missing.
        UserError: an unknown layout, or weights that do not fit: all of them are listed.
        MissingPackageError: what a LoRA adapter or a tokenizer needs.
    """
    if [preset, skip, config].count(None) < 2:
        raise UserError("Give preset or skip or config, only one of them.")
    parts: dict[str, Any] = {"projector": projector, "lora": lora, "language_model_type": language_model_type}
    source = open_source(path, vision_tower=vision_tower, **parts)
    report = source.report
    weights, own_tower = source.combine(read_model_weights(source.folder))
    if EMBEDDING not in weights:
        raise UserError(f"{path} has no embedding of the language model: is it a whole model?")
    config = config or configure(source, weights, own_tower, preset=preset, skip=skip, reduction=reduction)
    if source.joins:
        weights |= _tower_weights(source, weights)
        _express_linear(weights, source.settings, report)
    _fit(weights, config, source)
    _check(weights, config, report, new_projector=report.layout == layouts.LANGUAGE and not projector)
    kept = {name: tensor for name, tensor in weights.items() if name not in report.unused}
    report.loaded = len(kept)
    model = _build(config, kept, dtype or weights[EMBEDDING].dtype, attn_implementation)
    _add_adapter(model, source)
    _set_stop_tokens(model, source.folder)
    _tell(report, log)
    model.load_report = report
    return model.eval()


def _tell(report: LoadReport, log: bool) -> None:
    if log and not report.is_exact:
        logger.warning("%s", plain(report))


def check_fit(folder: Path, config: LlavaSkipConfig) -> None:
    """Compare the files of a native model with a configuration, before any weight is read.

    Raises:
        MissingFileError: there are no weights.
        UserError: a file is broken, or weights are missing, unknown or of another shape.
    """
    report = LoadReport(str(folder), layouts.NATIVE)
    _check(native_weights(read_model_shapes(folder)), config, report, new_projector=False)


def read_native(folder: Path, reduction: ReductionConfig | None = None) -> LlavaSkipConfig:
    """The configuration of a native model; with a rival method, if one is given.

    Raises:
        UserError: it is broken, or the method does not fit it.
    """
    return configure(open_source(folder, weights=False), {}, own_tower=False, reduction=reduction)


def check_native(folder: Path, reduction: ReductionConfig | None = None) -> LlavaSkipConfig:
    """The configuration of a native model that fits its weights; see `check_fit` and `read_native`."""
    config = read_native(folder, reduction)
    check_fit(folder, config)
    return config


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], may_miss: Iterable[str] = ()) -> None:
    """Copy weights with native names into a model; nothing may be unknown, missing or of another shape.

    Args:
        model: the model.
        weights: tensors by native name.
        may_miss: prefixes of parameters that may keep the values they have.

    Raises:
        UserError: lists what is missing, unknown or of another shape.
    """
    own = model.state_dict()
    skipped = tuple(may_miss)
    missing = [name for name in own if name not in weights and not (skipped and name.startswith(skipped))]
    unknown = [name for name in weights if name not in own]
    reshaped = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
        for name in weights
        if name in own and weights[name].shape != own[name].shape
    ]
    if missing or unknown or reshaped:
        raise UserError(f"The weights do not fit the model. Missing: {missing}. Unknown: {unknown}. Shape: {reshaped}.")
    model.load_state_dict(weights, strict=False)


def _tower_weights(source: Source, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower's weights by native name, if the checkpoint does not hold them."""
    if source.tower is None or any(name.startswith(TOWER) for name in weights):
        return {}
    stored = read_model_weights(find_folder(source.tower, "vision tower"))
    names = {name: native_name(name).removeprefix(TOWER).removeprefix("vision_model.") for name in stored}
    tower = {f"{TOWER}{own}": stored[name] for name, own in names.items() if own.startswith(_TOWER_PARTS)}
    source.report.notes.append(
        f"vision tower of {source.tower}, {len(tower)} tensors of {len(stored)} (the rest is CLIP's text side)."
    )
    return tower


def _express_linear(weights: dict[str, Tensor], raw: dict[str, Any], report: LoadReport) -> None:
    """Make two layers of a linear projector: the second is the identity, with no activation between them."""
    if LINEAR_PROJECTOR not in weights:
        if raw.get("mm_projector_type") == "linear":
            raise UserError(f"mm_projector_type is 'linear', but there is no {LINEAR_PROJECTOR}.")
        return
    first = weights.pop(LINEAR_PROJECTOR)
    width = first.shape[0]
    weights[f"{PROJECTOR}linear_1.weight"] = first
    weights[f"{PROJECTOR}linear_1.bias"] = weights.pop("model.mm_projector.bias")
    weights[f"{PROJECTOR}linear_2.weight"] = torch.eye(width, dtype=first.dtype)
    weights[f"{PROJECTOR}linear_2.bias"] = torch.zeros(width, dtype=first.dtype)
    report.notes.append("The linear projector is linear_1; linear_2 is the identity, without activation between them.")


def _fit(weights: dict[str, Tensor], config: LlavaSkipConfig, source: Source) -> None:
    """Resize the tower's position table, and append rows for new tokens to the vocabulary's tables."""
    rows, report = config.text_config.vocab_size, source.report
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    if (table := weights.get(POSITIONS)) is not None and table.shape[0] != patches + 1:
        weights[POSITIONS] = resize_positions(table, patches)
        report.reshaped.append(f"{POSITIONS}: {table.shape[0]} -> {patches + 1} rows, bicubic")
    if not source.joins:
        return  # the vocabulary has the image token
    for name in (EMBEDDING, HEAD):
        if (table := weights.get(name)) is not None and table.shape[0] < rows:
            # With the mean of all rows in the head a new token never has the largest logit.
            mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
            weights[name] = torch.cat([table, mean.expand(rows - table.shape[0], -1)])
            report.reshaped.append(f"{name}: {table.shape[0]} -> {rows} rows, the new ones the mean")


def _check(weights: dict[str, Tensor], config: LlavaSkipConfig, report: LoadReport, new_projector: bool) -> None:
    """Fill the report's lists; raise UserError for what would change the checkpoint's results."""
    with torch.device("meta"):
        model = LlavaSkipForConditionalGeneration(config)
    own = model.state_dict()
    tied = set(model.all_tied_weights_keys)
    optional = ["model.summary.", *_unused_tower(config), *([PROJECTOR] if new_projector else [])]
    absent = [name for name in own if name not in weights and name not in tied]
    report.fresh += [name for name in absent if name.startswith(tuple(optional))]
    unknown = [name for name in weights if name not in own]
    essential = [name for name in unknown if name.startswith((LANGUAGE_MODEL, HEAD))]
    report.unused += [name for name in unknown if name not in essential]
    missing = [name for name in absent if name not in report.fresh]
    shapes = [
        f"{name} is {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
        for name, tensor in weights.items()
        if name in own and tensor.shape != own[name].shape
    ]
    read = HEAD in tied and HEAD in weights and not weights[HEAD].is_meta
    if read and not torch.equal(weights[HEAD], weights[EMBEDDING]):
        shapes.append(f"{HEAD} differs from the embedding, although tie_word_embeddings is true")
    if missing or essential or shapes:
        raise UserError(
            f"{report.source} (layout {report.layout}) does not fit the model of its config.json. Missing: {missing}. "
            f"Unknown: {essential}. Shape: {shapes}. Not used: {report.unused}."
        )


def _unused_tower(config: LlavaSkipConfig) -> list[str]:
    """Prefixes of the tower's weights after the features that are used: files may leave them out."""
    unused = range(config.read_tower_layers, config.vision_config.num_hidden_layers)
    return [f"{TOWER}post_layernorm.", *(f"{TOWER}encoder.layers.{index}." for index in unused)]


def _build(
    config: LlavaSkipConfig, weights: dict[str, Tensor], dtype: torch.dtype, attn_implementation: str | None
) -> LlavaSkipForConditionalGeneration:
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with _quiet():  # transformers prints a report of its own
        return LlavaSkipForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, **options
        )


def _add_adapter(model: LlavaSkipForConditionalGeneration, source: Source) -> None:
    if source.adapter:
        merge_lora(model, source.adapter, source.factors)
        modules = len(source.factors) // 2
        source.report.notes.append(f"LoRA adapter of {source.adapter} merged into {modules} modules.")


@contextmanager
def _quiet() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _set_stop_tokens(model: LlavaSkipForConditionalGeneration, folder: Path) -> None:
    """Take the ids that begin, end and pad, and the texts that end; a folder's sampling is that of another program."""
    text, saved = model.config.text_config, folder / "generation_config.json"
    ids = read_json(saved) if saved.is_file() else {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    kept = {name: ids.get(name, getattr(text, name, None)) for name in names}
    model.generation_config = GenerationConfig(**kept, stop_strings=ids.get("stop_strings"))
