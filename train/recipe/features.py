"""`--cache_vision_features`: which runs may store the features of their tower, where, and how much disk that takes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.processing import LlavaSkipProcessor
from llava_skip.reduction.method import Selection
from llava_skip.vision.stored import crop_bytes
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json

if TYPE_CHECKING:
    from train.arguments import DataArguments, ModelArguments, RunArguments
    from train.data import RecordSet

GIB = 2**30
SAMPLED = 1000
"""Records of which the images are counted, evenly spread over a set."""
_FLAG = "--cache_vision_features"


def check_features(model: ModelArguments, data: DataArguments, run: RunArguments, config: LlavaSkipConfig) -> None:
    """Refuse runs whose images have other features in another epoch, or that must all run the tower together.

    Raises:
        UserError: the folder is a file, the tower is trained or drops out, a rival method reads its layers, ZeRO-3,
            or a stream.
    """
    if data.cache_vision_features is None:
        return
    if (folder := Path(data.cache_vision_features).expanduser()).exists() and not folder.is_dir():
        raise UserError(f"{_FLAG} {folder} is a file: give a folder.")
    if "vision_tower" in model.trained_parts:
        parts = " ".join(part for part in model.trained_parts if part != "vision_tower")
        raise UserError(
            f"{_FLAG} is for a frozen tower, and this run trains it: leave it out, or give --train_parts {parts}."
        )
    if config.vision_config.attention_dropout:
        raise UserError(f"{_FLAG} does not go with attention_dropout of the tower, which changes its features.")
    reduction = config.reduction_config
    if reduction is not None and isinstance(reduction.rule, Selection):
        raise UserError(f"{_FLAG} does not go with --reduction {reduction}, which reads more of the tower.")
    if data.streaming:
        raise UserError(f"{_FLAG} needs a set whose size is known: leave out --streaming.")
    if run.deepspeed and read_json(Path(run.deepspeed)).get("zero_optimization", {}).get("stage") == 3:
        raise UserError(f"{_FLAG} does not go with ZeRO-3, whose processes must run the tower together: use zero2.")


def tower_dtype(run: RunArguments) -> torch.dtype:
    """In which a frozen tower of a run is."""
    return torch.bfloat16 if run.bf16 else torch.float16 if run.fp16 else torch.float32


def say_size(folder: Path, records: RecordSet, config: LlavaSkipConfig, dtype: torch.dtype) -> str:
    """How much disk the features of a set take, in words.

    Raises:
        UserError: there is not so much left.
    """
    rows = records.used_rows
    chosen = rows[np.linspace(0, len(rows) - 1, min(SAMPLED, len(rows))).round().astype(np.int64)]
    images = np.mean([len(records.record(int(row))["images"]) for row in chosen]) * len(rows)
    crop = crop_bytes(config, dtype)
    whole = images * config.most_crops * crop
    there = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    exists = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(exists).free
    words = (
        f"{whole / GIB:.3g} GiB at most for about {images:,.0f} images, {crop / 2**20:.3g} MiB for each of up to "
        f"{config.most_crops} crops"
    )
    if whole - there > free:
        raise UserError(f"{_FLAG} {folder} would take {words}; {free / GIB:.3g} GiB are free there: give another one.")
    return f"vision features in {folder}: {words}; {there / GIB:.3g} GiB are there, {free / GIB:.3g} GiB are free"


def features_folder(
    folder: Path,
    tower: nn.Module,
    config: LlavaSkipConfig,
    processor: LlavaSkipProcessor,
    attention: str | None = None,
) -> Path:
    """The folder of a tower's features: named by its weights, by what is taken of it, and by the image processor.

    Args:
        folder: what the user gave.
        tower: with its weights.
        config: of the model.
        processor: of the run.
        attention: the implementation that the run asks for.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    taken = {
        "front_end": config.front_end,
        "layer": config.vision_feature_layer,
        "layers": config.used_tower_layers,
        "resampler": config.resampler,
        "ranks": config.skip is not None,
        "attention": attention,
        "processor": processor.image_processor.to_dict(),
    }
    digest.update(json.dumps(taken, sort_keys=True, default=str).encode())
    return folder / digest.hexdigest()[:16]
