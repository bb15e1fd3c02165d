"""Read the table formats in which benchmarks and predictions are published, with one convention for cells.

A cell is a ``str`` (missing cells are ``""``), except for nested JSON values and image bytes, which stay what they are.
Nothing is guessed to be missing: an option or a prediction that reads "None" or "NA" stays that text. Column names are
lower-cased with ``_`` for ``-``, except the one-letter option columns, so ``L2-category`` and ``l2_category`` are one.
"""

import csv
import hashlib
import json
import math
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from eval.errors import EvalError, some

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Read a tsv, csv, xlsx, json, jsonl or parquet file into rows.

    A JSON object becomes a row for each key, with the key as ``id``: ``{"v1_0": "text"}`` gives an ``id`` and a
    ``prediction``, ``{"v1_0": {...}}`` an ``id`` and the fields.

    Args:
        path: the file; its suffix decides the format.

    Raises:
        EvalError: if the file is missing, empty, malformed or of another format.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise EvalError(f"{path}: cannot read '{path.suffix}' files; give one of {', '.join(READERS)}.")
    if not path.is_file():
        raise EvalError(f"{path}: no such file; check the path.")
    try:
        rows = list(reader(path))
    except UnicodeDecodeError as error:
        raise EvalError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8.") from error
    if not rows:
        raise EvalError(f"{path}: holds no rows.")
    return rows


def sha256(paths: Iterable[Path]) -> str:
    """Hash files (name and content, in the order given), so that results say what they were made from.

    Args:
        paths: the files to hash as one.
    """
    paths = list(paths)
    digest = hashlib.sha256()
    for path in paths:
        if len(paths) > 1:  # one file alone keeps the hash that sha256sum prints
            digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def cell_text(value: Any) -> Any:
    """Bring one cell to text: missing is "", whole floats lose their ".0"; nested values and bytes are kept."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | list | dict | bytes):
        return value
    return str(value)


def column_name(name: str) -> str:
    """Return the canonical spelling of a column name; option columns keep their capital letter."""
    name = name.strip()
    return name if len(name) == 1 else name.lower().replace("-", "_")


def _rows(path: Path, header: list[str], lines: Iterable[list[Any]]) -> Iterator[Row]:
    """Pair each line of a sheet with the header; unnamed columns (a saved data-frame index) are left out."""
    names = [column_name(name) for name in header]
    doubled = sorted({name for name in names if name and names.count(name) > 1})
    if doubled:
        raise EvalError(f"{path}: column names occur twice: {some(doubled)}; rename or drop one.")
    for line in lines:
        yield {name: cell_text(value) for name, value in zip(names, line, strict=True) if name}


def _read_delimited(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a base64 image is far beyond the default of 128 kB
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            yield from _rows(path, header, _checked(path, reader, len(header)))
        except csv.Error as error:
            raise EvalError(f"{path}, line {reader.line_num}: {error}; is a quote open or the file cut?") from error


def _checked(path: Path, reader: Any, width: int) -> Iterator[list[str]]:
    for line in reader:
        if line and len(line) != width:
            raise EvalError(
                f"{path}, line {reader.line_num}: {len(line)} fields, but the header has {width}; "
                "is the file cut, or are its fields not quoted?"
            )
        if line:
            yield line


def _read_xlsx(path: Path) -> Iterator[Row]:
    import openpyxl  # only a few prediction files need it, and it is slow to import
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        # Formulas are read as their text: an answer that starts with "=" was written by the model, not by a person.
        book = openpyxl.load_workbook(path, read_only=True, data_only=False)
    except (InvalidFileException, zipfile.BadZipFile, KeyError) as error:
        raise EvalError(f"{path}: not an Excel workbook ({error}); save it again as xlsx.") from error
    lines = book.active.iter_rows(values_only=True)
    header = ["" if name is None else str(name) for name in next(lines, ())]
    width = len(header)
    filled = ([*line, *[None] * (width - len(line))] for line in lines if any(value is not None for value in line))
    yield from _rows(path, header, filled)
    book.close()


def _record(path: Path, where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise EvalError(f"{path}, {where}: expected a JSON object, saw {type(value).__name__}.")
    return {column_name(name): cell_text(cell) for name, cell in value.items()}


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise EvalError(f"{path}, line {number}: not valid JSON ({error.msg}); is the file cut?") from error
            yield _record(path, f"line {number}", value)


def _read_json(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # some tools name JSON lines ".json"
            yield from _read_jsonl(path)
            return
        raise EvalError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); is the file cut?") from error
    if isinstance(value, dict):
        for key, item in value.items():
            fields = item if isinstance(item, dict) else {"prediction": item}
            yield {"id": key, **_record(path, key, fields)}
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield _record(path, f"item {number}", item)
    else:
        raise EvalError(f"{path}: expected a JSON list or object, saw {type(value).__name__}.")


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise EvalError(f"{path}: reading parquet needs pyarrow; run 'pip install pyarrow'.") from error
    for batch in parquet.ParquetFile(path).iter_batches():
        for value in batch.to_pylist():
            yield _record(path, "row", value)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".tsv": lambda path: _read_delimited(path, "\t"),
    ".csv": lambda path: _read_delimited(path, ","),
    ".xlsx": _read_xlsx,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
