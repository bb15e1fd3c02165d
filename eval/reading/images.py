"""Pictures of benchmark records: base64 text, raw bytes or files, of any mode, given to the model as RGB."""

import ast
import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from eval.errors import EvalError, first_few
from eval.reading.tables import REFERENCE_LENGTH, Row, StoredText

PLACEHOLDER = "<image>"
"""Where a prompt that names its pictures' places wants one of them."""


@dataclass(frozen=True)
class Picture:
    """A picture that is decoded only when it is used.

    Attributes:
        record: the record it belongs to, for messages.
        data: base64 text (or where it is stored), encoded bytes, or the path of a file.
        place: which one it is, where the data is a list of base64 texts.
    """

    record: str
    data: str | bytes | Path | StoredText = field(repr=False)
    place: int = 0

    def open(self) -> Image.Image:
        """Decode the picture to RGB."""
        from llava_skip.vision.rgb import to_rgb  # brings torch, which scoring does without

        with self._readable():
            return to_rgb(Image.open(self._file()))

    def check(self) -> None:
        """Read the header only, so that a broken picture is reported before a model is loaded."""
        with self._readable():
            Image.open(self._file()).close()

    def _file(self) -> io.BytesIO | Path:
        if isinstance(self.data, Path):
            return self.data
        if isinstance(self.data, bytes):
            return io.BytesIO(self.data)
        text = self.data.read() if isinstance(self.data, StoredText) else self.data
        if text.startswith("["):  # VLMEvalKit's cell of several pictures
            texts = ast.literal_eval(text)
            if self.place >= len(texts):
                raise ValueError(f"picture {self.place + 1} of {len(texts)} is asked for")
            text = texts[self.place]
        return io.BytesIO(base64.b64decode("".join(text.split()), validate=True))

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise EvalError(f"{self.record}: image file {error.filename} does not exist; check --images.") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise EvalError(f"{self.record}: its picture cannot be decoded ({error}); repair or replace it.") from error


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
            f"{first_few(lacking)} of {len(rows)} records have no picture: expected base64 in 'image', the index of the row "
            "that owns the picture, or a file name in 'imagename' or 'image_path'."
        )
    missing = [str(p.data) for p in found if isinstance(p.data, Path) and not p.data.is_file()]
    if missing:
        raise EvalError(
            f"{first_few(missing)} image files do not exist; looked in {folder}, set --images to their folder."
        )
    checked: set[int] = set()
    for picture in found:
        if id(picture.data) not in checked:  # circular copies share one picture
            checked.add(id(picture.data))
            picture.check()
    return found


def _picture(row: Row, folder: Path, owners: dict[str, str | StoredText]) -> Picture | None:
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
    return isinstance(cell, StoredText) or (isinstance(cell, str) and len(cell) > REFERENCE_LENGTH)


def _name(row: Row) -> str:
    return f"record {row.get('index') or row.get('question_id') or row.get('id')}"
