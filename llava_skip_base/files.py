"""Files: the reader and the atomic writer of the project, and the rule for "local folder or hub name"."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from llava_skip_base.errors import MissingFileError, UserError
from llava_skip_base.texts import shortened

_FILES = (".bin", ".safetensors", ".json", ".jsonl", ".parquet", ".arrow")
"""Endings of local files, which hub names do not have."""
DEEPEST = 100
"""Levels of JSON from outside. Deeper values would end in the middle of a run, when they are written."""
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape that stands for one half of a character outside of Unicode's first plane."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the few lines begin that git writes in place of a large file until git-lfs has fetched it."""


def refuse_pointer(path: Path) -> None:
    """Raise UserError if a file that exists is a git-lfs pointer, in place of the file itself."""
    if is_pointer(path):
        raise UserError(f"{path} is a git-lfs pointer, not the file itself: run git lfs pull in {path.parent}.")


def is_pointer(path: Path) -> bool:
    """Whether a file that exists is a git-lfs pointer."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is not UTF-8, or a git-lfs pointer.
    """
    if not path.is_file():
        raise MissingFileError(f"{path.parent} has no {path.name}.")
    refuse_pointer(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); convert it to UTF-8.") from error


def parse_json(text: str, halves: bool = False, **options: Any) -> Any:
    """The value of a JSON text, which may come from anybody.

    Args:
        text: the JSON.
        halves: half characters are not looked for: the caller does it in what it reads.
        **options: of `json.loads`.

    Raises:
        ValueError: it is not JSON (a `JSONDecodeError`), is nested more than `DEEPEST` levels, has a number of more
            digits than Python converts, or holds half a character, which could not be written again.
    """
    try:
        value = json.loads(text, **options)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError(f"a number has more than {sys.get_int_max_str_digits()} digits") from None
        raise
    if is_deep_json(text, value):
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    if not halves and _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise ValueError(f"holds half a character, \\u{code:x} without its other half") from None
    return value


def is_deep_json(text: str, value: Any) -> bool:
    """Whether the value of a JSON text is nested more than `DEEPEST` levels."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return False
    level, depth = [value], 0
    while level and depth < DEEPEST:
        parts = (
            whole.values() if isinstance(whole, dict) else whole for whole in level if isinstance(whole, dict | list)
        )
        level, depth = [part for own in parts for part in own if isinstance(part, dict | list)], depth + 1
    return bool(level)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is not JSON, see `parse_json`.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); correct it or write it again.") from error


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number, from 1, and value of each line of a JSON-lines file; empty lines are left out.

    Raises:
        MissingFileError: there is no such file.
        UserError: a line is not JSON.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error}); correct the line.") from error
        yield number, value


def as_json(value: Any) -> Any:
    """`value` as it is after it was written as JSON and read again."""
    return json.loads(json.dumps(value, default=str))


def json_lines(records: Iterable[Any]) -> str:
    """The text of a JSON-lines file, one record a line."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step: readers see the old content or the new one, never a part.

    The temporary file has a name of its own, so that two processes can write the same path at once. The folder is made
    if it does not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around the writing of a path that the user chose: what the system refuses is a UserError."""
    try:
        yield
    except UserError:
        raise  # of what is read meanwhile
    except OSError as error:
        raise UserError(
            f"{shortened(path, 300)} cannot be written ({shortened(error, 200)}): give another path, or make room."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text in one step."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """Write JSON in one step; what JSON does not know is written as its `str`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys, default=str) + "\n")


def write_json_lines(path: Path, records: Iterable[Any]) -> None:
    """Write a JSON-lines file in one step."""
    write_text(path, json_lines(records))


def image_path(folder: str | Path, name: str) -> Path:
    """The path of an image that data names; it must be below the image folder, whose links are followed.

    Raises:
        UserError: the name is absolute or goes up.
    """
    if leaves_folder(name):
        raise UserError(f"{shortened(name)} leaves the image folder {folder}")
    return Path(folder) / name


def leaves_folder(name: str) -> bool:
    """Whether a name that stands in a file is absolute or goes up."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def hash_file(path: Path, digest: Any) -> None:
    """Add a file's bytes to a digest of `hashlib`, a piece at a time."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)


def is_hub_name(text: str) -> bool:
    """Whether a text has the form of a hub name, `owner/name`."""
    return text.count("/") == 1 and text[0] not in "./~" and Path(text).suffix not in _FILES


def local_path(source: str | Path) -> Path | None:
    """The local path that `source` names, with `~` expanded; None for a hub name.

    A path that exists is local. Anything else is a hub name if it has that form, and a local path that is missing
    otherwise.
    """
    path = Path(os.path.expanduser(source))
    return None if isinstance(source, str) and not os.path.exists(path) and is_hub_name(source) else path


def find_local(source: str | Path, what: str) -> Path | None:
    """As `local_path`, for a folder or file that must exist.

    Args:
        source: a local path or a hub name.
        what: what it is, for the message ("model", "vision tower").

    Raises:
        MissingFileError: it looks like a local path, and does not exist.
    """
    path = local_path(source)
    if path is not None and not os.path.exists(path):
        raise MissingFileError(
            f"The {what} {shortened(source, 300)} does not exist: give a folder or a hub name (owner/name)."
        )
    return path


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
