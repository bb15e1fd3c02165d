"""Files and `datasets` sets -> memory-mapped Arrow tables.

JSON is read as a stream, once, into a table of one schema, which `datasets` keeps in its cache under the file's name,
size and time; memory does not grow with the records or the processes that read them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub.constants import HF_HOME
from tqdm import tqdm

from llava_skip_base.errors import MissingFileError, UserError, first_few, shortened
from llava_skip_base.files import local_path, refuse_pointer
from llava_skip_base.texts import one_line
from train.data.json_items import Item, json_items, json_kind
from train.data.records import Record, broken, normalise

SCHEMA = Features(
    {
        "id": Value("string"),
        "messages": List({"role": Value("string"), "content": Value("string"), "supervised": Value("bool")}),
        "images": List(Value("large_string")),
        "fault": Value("string"),
        "unread": List(Value("string")),
    }
)
"""The columns of a table made of JSON."""
FORMAT = 3
"""Raise it when the meaning of a table changes: tables of another number are not used again."""
BATCH = 200
"""Records that are in memory while a table is written; with images inside them they can be long."""


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
    return _read_json(local) if json_kind(local) else _load_parquet([local])


def stream_table(path: str, split: str, config: str | None = None) -> IterableDataset:
    """As `read_table`, but read as it is needed, without a copy on disk."""
    local = _existing(path)
    if local is None:
        rows = _load(path, name=config, split=split, streaming=True)
    elif local.is_dir():
        rows = _load_folder(local, split).to_iterable_dataset()
    elif json_kind(local):
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
    if not local.is_dir() and not json_kind(local) and local.suffix.lower() != ".parquet":
        known = ".json, .jsonl or .ndjson (also with .gz), .parquet, a folder or a hub name"
        raise UserError(f"DATA {path} is of an unknown kind: give {known}.")
    if local.is_file():
        refuse_pointer(local)
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
            _json_records, features=SCHEMA, cache_dir=str(cache_folder()), gen_kwargs=kwargs, writer_batch_size=BATCH
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, OSError):
            raise UserError(f"DATA {path} cannot be read, or its table written: {error.__cause__}") from error
        raise error.__cause__ or error from None
    finally:
        datasets.enable_progress_bars()


def _json_records(path: str, stamp: Any = None, version: int = FORMAT) -> Iterator[Record]:
    """Records of a .json list or of .jsonl lines; `stamp` and `version` only name the table in the cache."""
    file, found = Path(path), False
    for item in tqdm(json_items(file), desc=f"reading {file.name}", unit=" records", delay=2, disable=None):
        found = True
        yield _json_record(item, file.name)
    if not found:
        raise UserError(f"DATA {path} must hold a list of conversation objects, with at least one in it.")


def _json_record(item: Item, name: str) -> Record:
    """The record of an item; a fault says where it is."""
    where = f"{shortened(name)}, line {item.line}"
    if item.fault:
        return broken(item.name, f"{where} {item.fault}")
    record = normalise(item.value)
    if record["fault"]:
        record["fault"] = f"{where}: {record['fault']}"
    return record


def _one_line(error: BaseException) -> str:
    return shortened(one_line(error), 200)


def file_stamp(path: str | os.PathLike[str]) -> str:
    """Size and time of change of a file: another content has another stamp."""
    stat = os.stat(path)
    return f"{stat.st_size} {stat.st_mtime_ns}"
