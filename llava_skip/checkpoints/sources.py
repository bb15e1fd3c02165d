"""What a model is read from, and the one place that decides its configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig, PreTrainedConfig, PreTrainedTokenizerBase

import llava_skip.checkpoints.layouts as layouts
from llava_skip.checkpoints.adapters import find_projector, read_adapter, read_projector
from llava_skip.checkpoints.files import find_folder
from llava_skip.checkpoints.names import EMBEDDING, PROJECTOR, TOWER, native_name, native_weights
from llava_skip.checkpoints.report import LoadReport
from llava_skip.checkpoints.schema import read_config
from llava_skip.checkpoints.tokenizer import has_tokenizer, load_tokenizer
from llava_skip.configuration import LlavaSkipConfig, SkipConfig
from llava_skip.presets import PRESETS, fields_for_tower, front_end_of
from llava_skip.processing import find_image_token
from llava_skip.reduction.config import ReductionConfig
from llava_skip_base.errors import UserError
from llava_skip_base.files import local_path


def padded_vocabulary(tokens: int) -> int:
    """The vocabulary's size for a number of tokens: a multiple of 64, which makes matrix products fast."""
    return -(-tokens // 64) * 64


@dataclass
class Source:
    """A checkpoint and what is put on top of it; the weights of the checkpoint itself are not read yet.

    Attributes:
        folder: where the checkpoint is.
        raw: its config.json.
        settings: the same; for a language model those of the projector or adapter, if that has LLaVA's config.json.
        asked_tower: the vision tower that was given with the checkpoint.
        projector: the projector file's tensors by LLaVA's names; None without one.
        adapter: folder of the LoRA adapter.
        factors: the adapter's low-rank factors by native name.
        whole: the tensors saved whole with the adapter, by LLaVA's names.
        report: its layout is the settings'; what is inferred is noted there.
        language_model_type: of LLaVA's own layout, where its config.json does not say it.
    """

    folder: Path
    raw: dict[str, Any]
    settings: dict[str, Any]
    asked_tower: str | None
    report: LoadReport
    language_model_type: str | None = None
    projector: dict[str, Tensor] | None = None
    adapter: Path | None = None
    factors: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)

    @property
    def joins(self) -> bool:
        """Whether the model is made from a language model and a tower, so that its vocabulary gets the image token."""
        return self.report.layout in (layouts.ORIGINAL, layouts.LANGUAGE)

    @property
    def tower(self) -> str | None:
        """Folder or hub name of the vision tower; None if nothing names one."""
        return layouts.find_tower(self.settings, self.asked_tower, self.folder)

    def combine(self, stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        """The checkpoint's `stored` weights and those on top, by native name; whether the tower is the paper's CLIP."""
        if self.projector is not None:
            stale = [name for name in stored if native_name(name).startswith(PROJECTOR)]
            stored = {name: tensor for name, tensor in stored.items() if name not in stale} | self.projector
        own_tower = any("model.vision_tower.conv1.weight" in weights for weights in (stored, self.whole))
        return native_weights(stored) | native_weights(self.whole), own_tower


def open_source(
    path: str | Path,
    *,
    vision_tower: str | None = None,
    projector: str | Path | None = None,
    lora: str | Path | None = None,
    language_model_type: str | None = None,
    weights: bool = True,
) -> Source:
    """Find a checkpoint, and read what is put on top of it; without `weights` a hub's are not downloaded.

    `language_model_type` says what the language model is where the config.json has a name of its own for it.

    Raises:
        MissingFileError: a file is missing.
        UserError: an unknown layout, or a setting that the model cannot express.
    """
    folder, report = find_folder(path, weights=weights), LoadReport(str(path))
    raw = read_config(folder)
    report.layout, settings, kind = layouts.detect_layout(raw), raw, language_model_type
    file = find_projector(projector) if projector else None
    adapter = find_folder(lora, "LoRA adapter") if lora else None
    if report.layout == layouts.LANGUAGE:
        for parent in filter(None, (adapter, file and file.parent)):
            other = parent / "config.json"
            if other.is_file() and layouts.detect_layout(theirs := read_config(parent)) == layouts.ORIGINAL:
                settings, report.layout = theirs, layouts.ORIGINAL
                report.notes.append(f"settings of {other}.")
                # The base says what it is, whatever the name of the family that was trained on it.
                kind = language_model_type or raw["model_type"]
                break
    source = Source(folder, raw, settings, vision_tower, report, kind, adapter=adapter)
    if source.joins:
        layouts.check_settings(settings, report)
    elif vision_tower:
        raise UserError(f"{path} already has a vision tower (layout {report.layout}): leave --vision_tower out.")
    if file:
        source.projector = read_projector(file, report)
        report.notes.append(f"projector of {file}, {len(source.projector)} tensors.")
    if adapter:
        source.factors, source.whole = read_adapter(adapter)
    return source


def configure(
    source: Source,
    weights: Mapping[str, Tensor],
    own_tower: bool,
    tokenizer: PreTrainedTokenizerBase | None = None,
    preset: str | None = None,
    skip: SkipConfig | None = None,
    reduction: ReductionConfig | None = None,
) -> LlavaSkipConfig:
    """The configuration of the model that a source describes.

    Args:
        source: where the model comes from.
        weights: by native name. A language model's own are not needed, LLaVA's are: their shapes say what its
            config.json does not.
        own_tower: whether the tower is the paper's own CLIP.
        tokenizer: the language model's, with the image token; None takes the checkpoint's own, if it has one.
        preset: a key of `PRESETS`; None keeps what the checkpoint has.
        skip: the numbers themselves, instead of a preset.
        reduction: a rival method; None keeps what the checkpoint has.

    Raises:
        UserError: settings, sizes or a preset that do not fit each other.
    """
    raw, report = source.settings, source.report
    if source.joins:
        text = layouts.text_config(raw, source.language_model_type)
        if tokenizer is None and has_tokenizer(source.folder):
            tokenizer = load_tokenizer(source.folder, text, add_image_token=True)
        image_token = _make_room(text, weights, tokenizer, source.raw["vocab_size"])
        vision = _tower_config(source, weights, own_tower)
        if report.layout == layouts.LANGUAGE and preset in PRESETS and not front_end_of(preset).llava_projector:
            fields = fields_for_tower(preset, vision)  # the projector is new: the preset makes it
            joined = LlavaSkipConfig(text_config=text, image_token_index=image_token, **fields)
            return joined if reduction is None else joined.with_reduction(reduction)
        config = layouts.flat_config(raw, text, vision, weights, image_token, own_tower, report)
    elif report.layout == layouts.NATIVE:
        config = layouts.native_config(raw)
    else:
        config = layouts.hf_config(raw)
        if report.layout == layouts.LLAVA_NEXT:
            report.notes.append("LlavaNext cuts images into tiles with image_newline; here an image is one crop.")
    layouts.check_ids(config)
    summary = any(name.startswith("model.summary.") for name in weights)
    config = layouts.with_skip(config, preset, skip, raw, summary, report)
    return config if reduction is None else config.with_reduction(reduction)


def load_config(
    path: str | Path,
    preset: str | None = None,
    *,
    vision_tower: str | None = None,
    projector: str | Path | None = None,
    tokenizer: str | Path | None = None,
    reduction: ReductionConfig | None = None,
) -> tuple[LlavaSkipConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of a native model, or of a language model joined with a tower; no weights are read.

    `load_checkpoint(..., config=)` makes the model of this configuration; it has the same arguments. `tokenizer` is the
    folder or hub name of another tokenizer than the model's, `reduction` a rival method; None keeps what a saved model
    has.

    Raises:
        MissingFileError: a file is missing.
        UserError: parts that do not fit each other, or another layout, which is to be converted first.
    """
    source = open_source(path, vision_tower=vision_tower, projector=projector, weights=False)
    if (own := layouts.detect_layout(source.raw)) not in (layouts.NATIVE, layouts.LANGUAGE):
        raise UserError(
            f"{path} is a checkpoint of the layout {own!r}. Convert it first, then use the result: "
            f"llava-skip convert {path} CONVERTED"
        )
    # Before the tokenizer, for which transformers reads the same file: a mistake in it is not the tokenizer's.
    if source.joins:
        layouts.text_config(source.settings, source.language_model_type)
    else:
        layouts.native_config(source.raw)
    words = load_tokenizer(tokenizer or source.folder, add_image_token=source.joins)
    weights, own_tower = source.combine({})
    return configure(source, weights, own_tower, words, preset, reduction=reduction), words


def _make_room(
    text: PreTrainedConfig,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
) -> int:
    """Enlarge the vocabulary so that the image token has an id; returns the id."""
    size = weights[EMBEDDING].shape[0] if EMBEDDING in weights else vocabulary
    image_token = size if tokenizer is None else find_image_token(tokenizer)
    text.vocab_size = padded_vocabulary(max(size, image_token + 1, 0 if tokenizer is None else len(tokenizer)))
    return image_token


def _tower_config(source: Source, weights: Mapping[str, Tensor], own_tower: bool) -> CLIPVisionConfig:
    if own_tower:
        return layouts.tower_config_of_weights(weights)
    held = any(name.startswith(TOWER) for name in weights)
    here = source.tower is not None and (path := local_path(source.tower)) is not None and os.path.isdir(path)
    if held and not source.asked_tower and not here:
        source.report.notes.append(
            f"The tower {source.tower} is no folder: its sizes are read from its weights, heads of 64."
        )
        return layouts.tower_config_of_weights(weights)
    if source.tower is None:
        kind = source.settings.get("model_type")
        raise UserError(
            f"{source.report.source} is a {kind} model without a vision tower, and names none: give vision_tower "
            "(--vision_tower), a CLIP tower such as openai/clip-vit-large-patch14-336, to join the two."
        )
    return layouts.tower_config(source.tower)
