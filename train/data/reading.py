"""Files and `datasets` sets -> memory-mapped Arrow tables.

JSON is read as a stream, once, into a table of one schema, which `datasets` keeps in its cache under the file's name,
size and time; memory does not grow with the records or the processes that read them.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import ijson
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub.constants import HF_HOME
from tqdm import tqdm

from llava_skip_base.errors import MissingFileError, UserError, first_few
from llava_skip_base.files import local_path
from train.data.records import Record, normalise

SCHEMA = Features(
    {
        "id": Value("string"),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "images": List(Value("string")),
        "fault": Value("string"),
    }
)
"""The columns of a table made of JSON."""
FORMAT = 2
"""Raise it when the meaning of a table changes: tables of another number are not used again."""
JSON_KINDS = (".json", ".jsonl")
_MARK = codecs.BOM_UTF8


def cache_folder() -> Path:
    """Where tables, findings and lengths are kept: `HF_DATASETS_CACHE`, by default the cache of `datasets`."""
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets").expanduser()


def cache_file(name: str) -> Path:
    """A file of our own in the cache; its folder exists."""
    folder = cache_folder() / "llava_skip"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def read_table(path: str, split: str, config: str | None = None) -> Dataset:
    """A set of records: LLaVA JSON, JSONL, Parquet, a set saved by `datasets`, or one of the hub.

    Args:
        path: file, folder, or hub name (owner/name).
        split: of a set that has several.
        config: of a hub set that has several.

    Raises:
        MissingFileError: no such file.
        UserError: what is there cannot be read.
    """
    local = _existing(path)
    if local is None:
        return _load(path, name=config, split=split)
    if local.is_dir():
        return _load_folder(local, split)
    return _read_json(local) if local.suffix in JSON_KINDS else _load_parquet([local])


def stream_table(path: str, split: str, config: str | None = None) -> IterableDataset:
    """As `read_table`, but read as it is needed, without a copy on disk."""
    local = _existing(path)
    if local is None:
        rows = _load(path, name=config, split=split, streaming=True)
    elif local.is_dir():
        rows = _load_folder(local, split).to_iterable_dataset()
    elif local.suffix in JSON_KINDS:
        return IterableDataset.from_generator(_json_records, features=SCHEMA, gen_kwargs={"path": str(local)})
    else:
        rows = _load_parquet([local], streaming=True)
    return rows.decode(False)  # images inside a table stay bytes until they are opened


def table_stamp(table: Dataset) -> list[str]:
    """What changes whenever the records of a table do: files of the cache are named by what they were made of."""
    cache, stamps = cache_folder(), []
    for file in (Path(entry["filename"]) for entry in table.cache_files):
        cached = file.is_relative_to(cache)
        stamps.append(f"{file.relative_to(cache)} {file.stat().st_size}" if cached else f"{file} {file_stamp(file)}")
    return stamps


def _existing(path: str) -> Path | None:
    """The file or folder of a set; None for a hub name."""
    local = local_path(path)
    if local is None:
        return None
    if not local.exists():
        raise MissingFileError(f"DATA {path} does not exist: give a LLaVA conversation JSON file, or another set.")
    if not local.is_dir() and local.suffix not in (*JSON_KINDS, ".parquet"):
        raise UserError(f"DATA {path} is of an unknown kind: give .json, .jsonl, .parquet, a folder or a hub name.")
    return local


def _load(path: str, **options: Any) -> Any:
    """`datasets.load_dataset`; what it raises about a set that it does not find or cannot read is a UserError."""
    try:
        return datasets.load_dataset(path, cache_dir=str(cache_folder()), keep_in_memory=False, **options)
    except (DatasetsError, OSError, ValueError) as error:
        source = first_few(options["data_files"]) if "data_files" in options else path
        raise UserError(f"DATA {source} cannot be read: {_one_line(error.__cause__ or error)}") from error


def _load_parquet(files: list[Path], **options: Any) -> Any:
    return _load("parquet", data_files=list(map(str, files)), split="train", **options)


def _load_folder(folder: Path, split: str) -> Dataset:
    if not ((folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()):
        if not (files := sorted(folder.glob("**/*.parquet"))):
            raise UserError(f"DATA {folder} is a folder, but neither saved by `datasets` nor one of .parquet files.")
        return _load_parquet(files)
    try:
        loaded = datasets.load_from_disk(str(folder), keep_in_memory=False)
    except (OSError, ValueError) as error:
        raise UserError(f"DATA {folder} cannot be read: {_one_line(error)}") from error
    if isinstance(loaded, Dataset):
        return loaded
    if split not in loaded:
        raise UserError(f"DATA {folder} has the splits {', '.join(loaded)}, not {split!r}: name one with `split`.")
    return loaded[split]


def _read_json(path: Path) -> Dataset:
    # A list among them would be taken for shards, and read once for each of its entries.
    kwargs = {"path": str(path.resolve()), "stamp": file_stamp(path), "version": FORMAT}
    datasets.disable_progress_bars()  # ours is shown if a file is large
    try:
        return Dataset.from_generator(
            _json_records, features=SCHEMA, cache_dir=str(cache_folder()), gen_kwargs=kwargs
        )  # fmt: skip
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, OSError):
            raise UserError(f"DATA {path} cannot be read, or its table written: {error.__cause__}") from error
        raise error.__cause__ or error from None
    finally:
        datasets.enable_progress_bars()


def _json_records(path: str, stamp: Any = None, version: int = FORMAT) -> Iterator[Record]:
    """Records of a .json list or of .jsonl lines; `stamp` and `version` only name the table in the cache."""
    rows = _lines(path) if path.endswith(".jsonl") else _items(path)
    found = False
    for row in tqdm(rows, desc=f"reading {Path(path).name}", unit=" records", delay=2, disable=None):
        found = True
        record = row if isinstance(row, _Broken) else normalise(row)
        # A JSON row has only the name of an image.
        record["images"] = [image if isinstance(image, str) else image["path"] for image in record["images"]]
        yield dict(record)
    if not found:
        raise UserError(f"DATA {path} must hold a list of conversation objects, with at least one in it.")


class _Broken(dict):
    """The record of a line that is not JSON."""


def _lines(path: str) -> Iterator[Any]:
    with open(path, "rb") as file:  # json skips a byte order mark in bytes, but not in text
        for number, line in enumerate(file, start=1):
            if number == 1 and line.removeprefix(_MARK).lstrip().startswith(b"["):
                raise UserError(f"DATA {path} holds a list, not one object a line: name it .json.")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                row = _Broken(id=None, messages=[], images=[], fault=f"line {number} is not valid JSON: {error}")
            yield row


def _items(path: str) -> Iterator[Any]:
    with open(path, "rb") as file:
        if file.read(len(_MARK)) != _MARK:
            file.seek(0)
        start = file.tell()
        try:
            event, _ = next(ijson.basic_parse(file), (None, None))
            file.seek(start)
            if event == "start_array":
                yield from ijson.items(file, "item", use_float=True)
                return
            json.load(file)
        except (ijson.JSONError, ValueError) as error:
            hint = " (one object a line is named .jsonl)" if str(error).startswith("Extra data") else ""
            raise UserError(f"DATA {path} is not valid JSON: {_one_line(error)}{hint}.") from error
    raise UserError(f"DATA {path} must hold a list of conversation objects, with at least one in it.")


def _one_line(error: BaseException) -> str:
    said = error.args[0] if error.args else ""
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(error)  # ijson's messages are bytes
    return " ".join(text.split())[:200]


def file_stamp(path: str | os.PathLike[str]) -> str:
    """Size and time of change of a file: another content has another stamp."""
    stat = os.stat(path)
    return f"{stat.st_size} {stat.st_mtime_ns}"
