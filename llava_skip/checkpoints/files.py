"""Reading of what lies in a checkpoint folder: configuration, weights, tokenizer."""

from __future__ import annotations

import importlib.util
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from llava_skip.errors import MissingFileError, MissingPackageError, UserError
from llava_skip.processing import IMAGE_TOKEN

_TEXT_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_CONFIG = "adapter_config.json"
"""What a folder holds that PEFT has saved an adapter in."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def find_folder(source: str | Path) -> Path:
    """The folder of a checkpoint: a local one, or the download of a hub name (`owner/name`).

    Raises:
        MissingFileError: neither.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    name = str(source)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise MissingFileError(f"{name} is no folder: give a checkpoint folder or a hub name (owner/name).")
    folder = Path(snapshot_download(name, allow_patterns=[*_TEXT_FILES, "*.safetensors"]))
    if not any(folder.glob("*.safetensors")):  # only then the pickled weights, which would double the download
        snapshot_download(name, allow_patterns=["*.bin"])
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        MissingFileError: there is no such file.
    """
    if not path.is_file():
        raise MissingFileError(f"{path.parent} has no {path.name}.")
    return json.loads(path.read_text(encoding="utf-8"))


def find_model_weights(folder: Path) -> list[Path]:
    """The files of a model folder's weights: safetensors before pytorch_model.bin, one file or shards.

    Raises:
        MissingFileError: no weights, or a shard that the index names is missing.
    """
    for name in _MODEL_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(read_json(index)["weight_map"].values()))
            if absent := [shard for shard in shards if not (folder / shard).is_file()]:
                raise MissingFileError(f"{folder} lacks the shards {absent} that {index.name} names.")
            return [folder / shard for shard in shards]
        if (folder / name).is_file():
            return [folder / name]
    hint = ""
    if is_adapter(folder):
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        hint = (
            f" It holds a LoRA adapter: load its model ({base}) and give this folder as lora, or merge the two "
            f"(python -m llava_skip.convert {base} OUTPUT --lora {folder})."
        )
    elif (folder / "mm_projector.bin").is_file():
        hint = " It holds a projector: load its language model and give this folder as projector."
    raise MissingFileError(f"{folder} has no model weights ({', '.join(_MODEL_FILES)}, or shards with an index).{hint}")


def read_model_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a model folder; errors as `find_model_weights`."""
    return {key: tensor for file in find_model_weights(folder) for key, tensor in read_tensors(file).items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped into memory where its format allows.

    Raises:
        UserError: a pickle that holds anything but tensors and plain data.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        # A pickle may run any code; weights_only refuses all but tensors. Old, unzipped files cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: it does not hold plain tensors ({_first_line(error)})") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} is refused: it does not hold a dictionary of tensors.")
    return content


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def load_tokenizer(folder: Path, text: PreTrainedConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder with `<image>` as one token (added if need be); None if the folder has none.

    Args:
        folder: the checkpoint.
        text: configuration of its language model. It says which tokenizer class to take where the folder does not:
            its own config.json may be of a type that transformers does not know, or takes for another one.

    Raises:
        MissingPackageError: the folder has a SentencePiece tokenizer alone, and that package is not installed.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    sentencepiece_alone = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if sentencepiece_alone and importlib.util.find_spec("sentencepiece") is None:
        # transformers would ask for another package here, with which it still could not read the file.
        raise MissingPackageError(f"The tokenizer.model of {folder} needs sentencepiece: pip install sentencepiece.")
    tokenizer = AutoTokenizer.from_pretrained(folder, config=text)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer
