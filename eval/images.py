"""Pictures of benchmark records: base64 text, raw bytes or files, of any mode, given to the model as RGB."""

import base64
import binascii
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from eval.errors import EvalError, some
from eval.tables import Row

# A cell this short cannot be a picture: VLMEvalKit stores there the index of the row that owns the picture.
REFERENCE_LENGTH = 64


@dataclass(frozen=True)
class Picture:
    """A picture that is decoded only when it is used.

    Attributes:
        record: the record it belongs to, for messages.
        data: base64 text, encoded bytes, or the path of a file.
    """

    record: str
    data: str | bytes | Path = field(repr=False)

    def open(self) -> Image.Image:
        """Decode the picture to RGB."""
        with self._readable():
            return to_rgb(Image.open(self._file()))

    def check(self) -> None:
        """Read the header only, so that a broken picture is reported before a model is loaded."""
        with self._readable():
            Image.open(self._file()).close()

    def _file(self) -> io.BytesIO | Path:
        if isinstance(self.data, Path):
            return self.data
        if isinstance(self.data, str):
            return io.BytesIO(base64.b64decode("".join(self.data.split()), validate=True))
        return io.BytesIO(self.data)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise EvalError(f"{self.record}: image file {error.filename} does not exist; check --images.") from error
        except (OSError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
            raise EvalError(f"{self.record}: its picture cannot be decoded ({error}); repair or replace it.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB; 16-bit greys are scaled, since PIL would clip them to white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = np.asarray(image, dtype=np.float64)
        scale = 257.0 if grey.max(initial=0) > 255 else 1.0
        image = Image.fromarray(np.clip(grey / scale, 0, 255).astype(np.uint8))
    return image.convert("RGB")


def row_pictures(rows: list[Row], folder: Path) -> list[Picture]:
    """Find the picture of each row and check that it can be opened.

    It is taken from ``image`` (base64, bytes, a Hugging Face ``{"bytes": ...}`` cell, or the index of the row that
    owns the picture) or else from a file named in ``imagename`` or ``image_path``.

    Args:
        rows: the rows of a benchmark file.
        folder: where image files lie.

    Raises:
        EvalError: naming the records whose picture is missing or broken.
    """
    owners = {row["index"]: row["image"] for row in rows if "index" in row and _is_base64(row.get("image"))}
    found, lacking = [], []
    for row in rows:
        picture = _picture(row, folder, owners)
        if picture:
            found.append(picture)
        else:
            lacking.append(_name(row))
    if lacking:
        raise EvalError(
            f"{some(lacking)} of {len(rows)} records have no picture: expected base64 in 'image', the index of the row "
            "that owns the picture, or a file name in 'imagename' or 'image_path'."
        )
    missing = [str(p.data) for p in found if isinstance(p.data, Path) and not p.data.is_file()]
    if missing:
        raise EvalError(f"{some(missing)} image files do not exist; looked in {folder}, set --images to their folder.")
    checked: set[int] = set()
    for picture in found:
        if id(picture.data) not in checked:  # circular copies share one picture
            checked.add(id(picture.data))
            picture.check()
    return found


def _picture(row: Row, folder: Path, owners: dict[str, str]) -> Picture | None:
    cell = row.get("image")
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    if isinstance(cell, str) and 0 < len(cell) <= REFERENCE_LENGTH:
        cell = owners.get(cell)
    if cell:
        return Picture(_name(row), cell)
    name = row.get("imagename") or row.get("image_path")
    return Picture(_name(row), folder / name) if name else None


def _is_base64(cell: object) -> bool:
    return isinstance(cell, str) and len(cell) > REFERENCE_LENGTH


def _name(row: Row) -> str:
    return f"record {row.get('index') or row.get('question_id') or row.get('id')}"
