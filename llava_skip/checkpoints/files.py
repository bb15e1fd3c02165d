"""The files of a checkpoint folder: where they are, and the tensors in them."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from llava_skip_base.errors import MissingFileError, UserError, first_few
from llava_skip_base.files import find_local, read_json, refuse_pointer
from llava_skip_base.texts import one_line

_TEXT_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
_UNREADABLE = (
    *(SafetensorError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError),
    *(AssertionError, OverflowError, struct.error, zipfile.BadZipFile),
)
"""What the readers of safetensors and, from the second on, of torch's files raise on damaged bytes."""
ADAPTER_CONFIG = "adapter_config.json"
"""The file by which a folder with a PEFT adapter is recognised."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def find_folder(source: str | Path, what: str = "model", weights: bool = True) -> Path:
    """The folder of a checkpoint: a local one, or the download of a hub name (`owner/name`).

    Args:
        source: the folder or the hub name.
        what: what it is, for the message.
        weights: download the weights too, not only configuration and tokenizer.

    Raises:
        MissingFileError: there is no such folder.
        UserError: a file instead of a folder, or a hub name that cannot be downloaded.
    """
    if (path := find_local(source, what)) is not None:
        if not path.is_dir():
            raise UserError(f"The {what} {source} is a file: give its folder, or a hub name (owner/name).")
        return path
    try:
        folder = Path(snapshot_download(str(source), allow_patterns=[*_TEXT_FILES, *["*.safetensors"] * weights]))
        if weights and not any(folder.glob("*.safetensors")):
            snapshot_download(str(source), allow_patterns=["*.bin"])  # only now: they would double the download
    except (OSError, HFValidationError) as error:
        raise UserError(f"The {what} {source} is neither a folder nor on the hub: {one_line(error)}") from error
    return folder


def refuse_pointers(folder: Path) -> None:
    """Raise UserError if a file of a folder that describes a model or its text is a git-lfs pointer."""
    for pattern in _TEXT_FILES:
        for path in filter(Path.is_file, folder.glob(pattern)):
            refuse_pointer(path)


def find_model_weights(folder: Path) -> list[Path]:
    """The files of a model folder's weights: safetensors before pytorch_model.bin, one file or shards.

    Raises:
        MissingFileError: no weights, or a shard that the index names is missing.
    """
    for name in _MODEL_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = _shards(index)
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
            f"(llava-skip convert {base} OUTPUT --lora {folder})."
        )
    elif (folder / "mm_projector.bin").is_file():
        hint = " It holds a projector: load its language model and give this folder as projector."
    raise MissingFileError(f"{folder} has no model weights ({', '.join(_MODEL_FILES)}, or shards with an index).{hint}")


def _shards(index: Path) -> list[str]:
    """The files that the index of a folder's weights names.

    Raises:
        UserError: it is no index, or names a file that is not in its own folder.
    """
    raw = read_json(index)
    where = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(shard, str) for shard in where.values()):
        raise UserError(f"{index} names no shards: its weight_map must be an object of tensors and files.")
    shards = sorted(set(where.values()))
    if outside := [shard for shard in shards if Path(shard).name != shard or shard in ("", ".", "..")]:
        raise UserError(f"{index} names files that are not in its folder: {first_few(outside)}.")
    if other := [
        shard for shard in shards if Path(shard).suffix != Path(index.name.removesuffix(".index.json")).suffix
    ]:
        raise UserError(f"{index} names files of another kind than its own: {first_few(other)}.")
    return shards


def check_model_weights(folder: Path) -> None:
    """Open the files of a model folder's weights without reading them; errors as `read_model_weights`."""
    for path in find_model_weights(folder):
        check_tensors(path)


def check_tensors(path: Path) -> None:
    """Open a file of tensors without reading them; errors as `read_tensors`."""
    refuse_pointer(path)
    if path.suffix != ".safetensors":
        read_tensors(path)  # only mapped into memory
        return
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise _broken(path, error) from error


def read_model_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a model folder; errors as `find_model_weights` and `read_tensors`."""
    return {key: tensor for file in find_model_weights(folder) for key, tensor in read_tensors(file).items()}


def read_model_shapes(folder: Path) -> dict[str, Tensor]:
    """As `read_model_weights`, but shapes alone: tensors of the device `meta`."""
    return {name: shape for file in find_model_weights(folder) for name, shape in _read_shapes(file).items()}


def _read_shapes(path: Path) -> dict[str, Tensor]:
    check_tensors(path)
    if path.suffix != ".safetensors":
        return {name: tensor.to("meta") for name, tensor in read_tensors(path).items()}  # only mapped into memory
    with safe_open(path, "pt") as file:
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped into memory where its format allows.

    Raises:
        MissingFileError: there is no such file.
        UserError: a broken file, a git-lfs pointer, or a pickle that holds anything but tensors and plain data.
    """
    if not path.is_file():
        raise MissingFileError(f"{path.parent} has no {path.name}.")
    refuse_pointer(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # A pickle may run any code; weights_only refuses all but tensors. Old, unzipped files cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: it does not hold plain tensors ({one_line(error, 1)})") from error
    except _UNREADABLE as error:
        raise _broken(path, error) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} is refused: it does not hold a dictionary of tensors.")
    return content


def _broken(path: Path, error: Exception) -> UserError:
    reason = one_line(error, 1) or type(error).__name__
    return UserError(f"{path.parent} cannot be loaded: {path.name} is broken ({reason}); copy or save it again.")
