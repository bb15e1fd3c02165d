"""Files and `datasets` sets -> memory-mapped Arrow tables.

JSON is read as a stream, once, into a table of one schema, which `datasets` keeps in its cache under the file's name,
size and time; memory grows neither with the records nor with the processes that read them.
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
from datasets.exceptions import DatasetGenerationError
from tqdm import tqdm

from llava_skip.errors import MissingFileError, UserError
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
"""To be raised when the meaning of a table changes: tables of another number are not used again."""
JSON_KINDS = (".json", ".jsonl")
_MARK = codecs.BOM_UTF8


def cache_folder() -> Path:
    """Where tables, reports and lengths are kept: the cache of `datasets` (`HF_DATASETS_CACHE`)."""
    return Path(datasets.config.HF_DATASETS_CACHE)


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
    local = Path(path)
    if local.suffix in JSON_KINDS:
        return _read_json(_existing(local))
    if local.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files=str(_existing(local)), split="train")
    if local.is_dir():
        return _load_folder(local, split)
    if local.exists() or local.is_absolute() or path.count("/") != 1 or path.startswith((".", "~")):
        _existing(local)
        raise UserError(f"DATA {path} is of an unknown kind: give .json, .jsonl, .parquet, a folder or a hub name.")
    return datasets.load_dataset(path, config, split=split)


def stream_table(path: str, split: str, config: str | None = None) -> IterableDataset:
    """As `read_table`, but read as it is needed, without a copy on disk."""
    local = Path(path)
    if local.suffix in JSON_KINDS:
        return IterableDataset.from_generator(
            _json_records, features=SCHEMA, gen_kwargs={"path": str(_existing(local))}
        )
    if local.suffix == ".parquet":
        rows = datasets.load_dataset("parquet", data_files=str(_existing(local)), split="train", streaming=True)
    elif local.is_dir():
        return _load_folder(local, split).to_iterable_dataset().decode(False)
    else:
        rows = datasets.load_dataset(path, config, split=split, streaming=True)
    return rows.decode(False)  # pictures inside a table stay bytes until they are opened


def _existing(path: Path) -> Path:
    if not path.exists():
        raise MissingFileError(f"DATA {path} does not exist: give a LLaVA conversation JSON file, or another set.")
    return path


def _load_folder(folder: Path, split: str) -> Dataset:
    if not ((folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()):
        files = sorted(str(file) for file in folder.glob("**/*.parquet"))
        if not files:
            raise UserError(f"DATA {folder} is a folder, but neither saved by `datasets` nor one of .parquet files.")
        return datasets.load_dataset("parquet", data_files=files, split="train")
    loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, Dataset):
        return loaded
    if split not in loaded:
        raise UserError(f"DATA {folder} has the splits {', '.join(loaded)}, not {split!r}: name one with `split`.")
    return loaded[split]


def _read_json(path: Path) -> Dataset:
    # A list among them would be taken for shards, and read once for each of its entries.
    kwargs = {"path": str(path.resolve()), "stamp": file_stamp(path), "version": FORMAT}
    datasets.disable_progress_bars()  # ours comes where a file is large
    try:
        return Dataset.from_generator(_json_records, features=SCHEMA, gen_kwargs=kwargs)
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None
    finally:
        datasets.enable_progress_bars()


def _json_records(path: str, stamp: Any = None, version: int = FORMAT) -> Iterator[Record]:
    """Records of a .json list or of .jsonl lines; `stamp` and `version` only name the table in the cache."""
    rows = _lines(path) if path.endswith(".jsonl") else _items(path)
    found = False
    for row in tqdm(rows, desc=f"reading {Path(path).name}", unit=" records", delay=2):
        found = True
        record = row if isinstance(row, _Broken) else normalise(row)
        # A JSON row cannot hold a picture itself, only its name.
        record["images"] = [image if isinstance(image, str) else image["path"] for image in record["images"]]
        yield dict(record)
    if not found:
        raise UserError(f"DATA {path} must hold a list of conversation objects, with at least one in it.")


class _Broken(dict):
    """The record of a line that is not JSON."""


def _lines(path: str) -> Iterator[Any]:
    with open(path, "rb") as file:  # json passes over a byte order mark in bytes, but not in text
        for number, line in enumerate(file, start=1):
            if number == 1 and line.removeprefix(_MARK).lstrip().startswith(b"["):
                raise UserError(f"DATA {path} holds a list, not one object a line: name it .json.")
            if line.strip():
                try:
                    yield json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    fault = f"line {number} is not valid JSON: {error}"
                    yield _Broken(id=None, messages=[], images=[], fault=fault)


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
        except (ijson.JSONError, json.JSONDecodeError, UnicodeDecodeError) as error:
            hint = " (one object a line is named .jsonl)" if str(error).startswith("Extra data") else ""
            raise UserError(f"DATA {path} is not valid JSON: {_one_line(error)}{hint}.") from error
    raise UserError(f"DATA {path} must hold a list of conversation objects, with at least one in it.")


def _one_line(error: Exception) -> str:
    said = error.args[0] if error.args else ""
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(error)  # ijson speaks in bytes
    return " ".join(text.split())[:200]


def file_stamp(path: str | os.PathLike[str]) -> str:
    """Size and time of change of a file: another content has another stamp."""
    stat = os.stat(path)
    return f"{stat.st_size} {stat.st_mtime_ns}"
