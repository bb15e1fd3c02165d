"""The processor of a saved model, whose settings may come from anybody: checked before transformers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoProcessor, BaseImageProcessor

from llava_skip.checkpoints.tokenizer import check_tokenizer_files
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json
from llava_skip_base.texts import one_line, shortened

_FILES = ("processor_config.json", "preprocessor_config.json")
_COUNTS = {"image_seq_length", "crop_rows", "max_tiles", "patch_size"}
_NAMES = {"image_token", "processor_class", "image_processor_type", "feature_extractor_type", "chat_template"}
_LARGEST = 1_000_000


def load_processor(folder: Path) -> Any:
    """The processor of a folder.

    Raises:
        UserError: a file of it is broken, or has a value that cannot be meant.
        MissingPackageError: a package is not installed.
    """
    check_tokenizer_files(folder, folder)
    for path in filter(Path.is_file, (folder / name for name in _FILES)):
        _check(read_json(path), str(path))
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ImportError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{folder}: its processor cannot be loaded ({shortened(one_line(error), 300)}).") from error


def _check(raw: Any, where: str) -> None:
    if not isinstance(raw, dict):
        raise UserError(f"{where} is {shortened(repr(raw))}; it must be an object of settings.")
    for name, value in raw.items():
        if value is not None and (expected := _fault(name, value)):
            raise UserError(f"{where} has {name} {shortened(repr(value))}; it must be {expected}.")
    for part in ("image_processor", "video_processor"):
        if part in raw:
            _check(raw[part], f"{part} of {where}")


def _fault(name: str, value: Any) -> str | None:
    """What a setting should be; None if it can be meant, or is of no interest."""
    if callable(getattr(BaseImageProcessor, name, None)):
        return "left out: a setting may not take the place of a method"
    if name in _COUNTS:
        return None if _is_size(value) else f"a whole number from 1 to {_LARGEST}"
    if name in _NAMES:
        return None if isinstance(value, str) else "a text"
    if name in ("size", "crop_size", "pad_size"):
        fits = _is_size(value) or (isinstance(value, dict) and bool(value) and all(map(_is_size, value.values())))
        return None if fits else "a size in pixels, or an object of them"
    if name in ("image_mean", "image_std"):
        numbers = value if isinstance(value, list) else [value]
        fits = len(numbers) in (1, 3) and all(map(_is_number, numbers)) and (name == "image_mean" or all(numbers))
        return None if fits else "a number for each of three colours" + ("" if name == "image_mean" else ", not 0")
    if name == "rescale_factor":
        return None if _is_number(value) else "a number"
    if name == "resample":
        return None if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 5 else "0 to 5"
    if name.startswith("do_") or name == "default_to_square":
        return None if isinstance(value, bool) else "true or false"
    return None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e9 < value < 1e9
