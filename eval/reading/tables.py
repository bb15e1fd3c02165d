"""Read the table formats in which benchmarks and predictions are published, with one convention for cells.

A cell is a `str` (missing cells are `""`), except for nested JSON values and image bytes, which stay what they are,
and base64 images of tsv and csv files, which stay in the file (`StoredText`) so that gigabytes can be read.
Nothing is guessed to be missing: an option or a prediction that reads "None" or "NA" stays that text. Column names are
lower-cased with `_` for `-`, except the one-letter option columns, so `L2-category` and `l2_category` are the same.
"""

import csv
import hashlib
import io
import json
import math
import os
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llava_skip_base.errors import UserError, first_few
from llava_skip_base.files import hash_file, parse_json, read_json_lines, read_text, refuse_pointer, write_bytes
from llava_skip_base.texts import shortened

Row = dict[str, Any]
Stamps = list[tuple[str, int, int, int]]

# A cell this short cannot be an image: VLMEvalKit stores there the index of the row that has the image.
REFERENCE_LENGTH = 64
LARGEST_WORKBOOK = 2_000_000_000
# What openpyxl, zipfile and the XML parser raise about damaged workbooks, besides errors of their own.
_RAISED_BY_OPENPYXL = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, NotImplementedError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError),
)
CELL_LIMIT = 32_767  # characters that Excel keeps in one cell
# What decides the answers: the files of a folder that are hashed, images left out.
HASHED_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet", ".tsv", ".txt", ".xlsx")


@dataclass(frozen=True)
class StoredText:
    """A long cell of a tsv or csv file, read when it is needed.

    Attributes:
        path: the file.
        start: first byte of the cell's row.
        size: bytes of the row.
        checksum: of these bytes.
        column: index of the cell in the row.
        delimiter: what separates the cells.
    """

    path: Path
    start: int
    size: int
    checksum: int
    column: int
    delimiter: str

    def read(self) -> str:
        """The cell's text.

        Raises:
            UserError: the file is gone or has changed since its rows were read.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                row = file.read(self.size)
        except FileNotFoundError:
            row = b""
        if zlib.crc32(row) != self.checksum:
            raise UserError(
                f"{self.path}: has been replaced or changed since it was read, so its images are no longer those of "
                "the questions; put the file back, or start again with another --output."
            )
        text = io.StringIO(row.decode(), newline="")
        return next(csv.reader(text, delimiter=self.delimiter))[self.column]


def read_rows(path: Path) -> list[Row]:
    """Read a tsv, csv, xlsx, json, jsonl or parquet file into rows.

    The suffix decides the format. A JSON object becomes a row for each key, with the key as `id`: `{"v1_0": "text"}`
    gives an `id` and a `prediction`, `{"v1_0": {...}}` an `id` and the fields.

    Raises:
        UserError: the file is missing, empty, malformed or of another format.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; give one of its files.")
    if not os.path.isfile(path):
        raise UserError(f"{shortened(path)}: no such file; check the path.")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: cannot read '{path.suffix}' files; give one of {', '.join(READERS)}.")
    refuse_pointer(path)
    try:
        rows = list(reader(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8.") from error
    except UserError:
        raise  # some are also OSErrors
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file.") from error
    if not rows:
        raise UserError(f"{path}: holds no rows.")
    return rows


def sha256(paths: Iterable[Path]) -> str:
    """One hash of several files (name and content, in the order given), so that results say what they were made from.

    Of a folder, its tables and texts count, but not its images.
    """
    files = [file for path in paths for file in _hashed_files(path)]
    digest = hashlib.sha256()
    for path in files:
        if len(files) > 1:  # one file alone keeps the hash that sha256sum prints
            digest.update(path.name.encode() + b"\0")
        hash_file(path, digest)
    return digest.hexdigest()


def stamps(path: Path) -> Stamps:
    """What changes when a file that `sha256` reads is written or replaced; empty if there is none."""
    files = [(file, file.stat()) for file in _hashed_files(path)] if os.path.exists(path) else []
    return [(str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino) for file, stat in files]


def _hashed_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in HASHED_SUFFIXES)


def write_xlsx(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> dict[str, int]:
    """Write rows as text cells, so that no answer is taken for a formula.

    Args:
        path: the file; its folder is made.
        columns: what to write, in order; a cell that a row lacks or that is "" stays empty.
        rows: the rows.

    Returns:
        The number of cells from which something was removed that a workbook cannot hold: `control_characters`, and
        `cut` (text after 32767 characters).
    """
    import openpyxl
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(list(columns))
    lost = {"control_characters": 0, "cut": 0}
    for row in rows:
        cells: list[Any] = []
        for value in (row.get(column, "") for column in columns):
            if isinstance(value, str) and value:
                text = ILLEGAL_CHARACTERS_RE.sub("", value)
                lost["control_characters"] += text != value
                lost["cut"] += len(text) > CELL_LIMIT
                value = WriteOnlyCell(sheet, text[:CELL_LIMIT])
                value.data_type = "s"  # openpyxl takes text that starts with "=" for a formula
            cells.append(None if value == "" else value)
        sheet.append(cells)
    content = io.BytesIO()
    book.save(content)
    write_bytes(path, content.getvalue())
    return lost


def cell_text(value: Any) -> Any:
    """A cell as text: missing is "", whole floats lose their ".0"; nested values and bytes are kept."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | list | dict | bytes):
        return value
    return str(value)


def column_name(name: str) -> str:
    """The canonical spelling of a column name; option columns keep their capital letter."""
    name = name.strip()
    return name if len(name) == 1 else name.lower().replace("-", "_")


def _column_names(path: Path, header: Iterable[str]) -> list[str]:
    """The canonical names of a header, "" for an unnamed column (a saved data-frame index)."""
    names = [column_name(name) for name in header]
    doubled = sorted({name for name in names if name and names.count(name) > 1})
    if doubled:
        raise UserError(f"{path}: column names occur twice: {first_few(doubled)}; rename or drop one.")
    return names


class _Lines:
    """The lines of an open UTF-8 file, which knows the place and the checksum of the row that is read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.read = self.start = self.checksum = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        encoding = "utf-8" if self.read else "utf-8-sig"
        self.read += len(line)
        self.checksum = zlib.crc32(line, self.checksum)
        return line.decode(encoding)

    def next_row(self) -> None:
        """Begin a row."""
        self.start, self.checksum = self.read, 0

    def stored(self, path: Path, column: int, delimiter: str) -> StoredText:
        """A cell of the row."""
        return StoredText(path, self.start, self.read - self.start, self.checksum, column, delimiter)


def _read_delimited(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a base64 image is far beyond the default of 128 kB
    with path.open("rb") as file:
        lines = _Lines(file)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            names = _column_names(path, next(reader, []))
            lines.next_row()
            for row in reader:
                if row:
                    _check_width(path, reader.line_num, row, names)
                    cells: list[Any] = list(row)
                    for column in (number for number, name in enumerate(names) if name == "image"):
                        if len(row[column]) > REFERENCE_LENGTH:
                            cells[column] = lines.stored(path, column, delimiter)
                    yield {name: cell for name, cell in zip(names, cells, strict=True) if name}
                lines.next_row()
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}; is a quote open or the file cut?") from error


def _check_width(path: Path, line: int, row: list[str], names: list[str]) -> None:
    if len(row) != len(names):
        raise UserError(
            f"{path}, line {line}: {len(row)} fields, but the header has {len(names)}; "
            "is the file cut, or are its fields not quoted?"
        )


def _read_xlsx(path: Path) -> Iterator[Row]:
    lines = iter(_sheet(path))
    names = _column_names(path, ["" if name is None else str(name) for name in next(lines, ())])
    for line in lines:
        if any(value is not None for value in line):
            cells = [*line, *[None] * (len(names) - len(line))]
            yield {name: cell_text(cell) for name, cell in zip(names, cells, strict=False) if name}


def _sheet(path: Path) -> list[tuple[Any, ...]]:
    """The values of a workbook's active sheet."""
    import openpyxl  # only a few prediction files need it, and it is slow to import
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        with zipfile.ZipFile(path) as parts:
            size = sum(part.file_size for part in parts.infolist())
        if size > LARGEST_WORKBOOK:
            raise UserError(f"{path}: holds {size:,} bytes when it is unpacked, too many; save it as tsv.")
        # Formulas are read as their text: an answer that starts with "=" was written by the model, not by a person.
        book = openpyxl.load_workbook(path, read_only=True, data_only=False)
        book.active.reset_dimensions()  # some writers store a wrong size, and cells outside of it would be dropped
        lines = list(book.active.iter_rows(values_only=True))
        book.close()
    except UserError:
        raise
    except (InvalidFileException, zipfile.BadZipFile, zlib.error, *_RAISED_BY_OPENPYXL) as error:
        raise UserError(f"{path}: not an Excel workbook ({shortened(error)}); save it again as xlsx.") from error
    return lines


def as_row(path: Path, where: str, value: Any) -> Row:
    """A JSON object as a row; `where` is its place in the file, for messages."""
    if not isinstance(value, dict):
        raise UserError(f"{path}, {where}: expected a JSON object, saw {type(value).__name__}.")
    return {column_name(name): cell_text(cell) for name, cell in value.items()}


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, value in read_json_lines(path):
        yield as_row(path, f"line {number}", value)


class _DoubledKeys(ValueError):
    """A JSON object names a key twice, of which the json module would silently keep the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _DoubledKeys(first_few([key for key, count in Counter(key for key, _ in pairs).items() if count > 1]))
    return found


def _read_json(path: Path) -> Iterator[Row]:
    text = read_text(path)
    try:
        value = parse_json(text, object_pairs_hook=_object)
    except _DoubledKeys as error:
        raise UserError(f"{path}: ids or fields occur more than once: {error}; remove the repeated ones.") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # some tools name JSON lines ".json"
            yield from _read_jsonl(path)
            return
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); is the file cut?") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); correct it.") from error
    if isinstance(value, dict):
        for key, item in value.items():
            fields = item if isinstance(item, dict) else {"prediction": item}
            yield {"id": key, **as_row(path, shortened(key), fields)}
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield as_row(path, f"item {number}", item)
    else:
        raise UserError(f"{path}: expected a JSON list or object, saw {type(value).__name__}.")


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"{path}: reading parquet needs pyarrow; run 'pip install pyarrow'.") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for value in batch.to_pylist():
                yield as_row(path, "row", value)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file, or damaged ({error}); download it again.") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".tsv": lambda path: _read_delimited(path, "\t"),
    ".csv": lambda path: _read_delimited(path, ","),
    ".xlsx": _read_xlsx,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
