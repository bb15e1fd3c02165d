"""Images of benchmark rows: base64 text, raw bytes or files, of any mode, given to the model as RGB."""

import ast
import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from eval.reading.tables import REFERENCE_LENGTH, Row, StoredText
from llava_skip_base.errors import UserError, first_few

PLACEHOLDER = "<image>"
"""Marks where in a prompt an image goes."""


@dataclass(frozen=True)
class ImageSource:
    """An image that is decoded only when it is used.

    Attributes:
        sample: the sample it belongs to, for messages.
        data: base64 text (or where it is stored), encoded bytes, or the path of a file.
        number: which one it is, from 0, where the data is a list of base64 texts.
    """

    sample: str
    data: str | bytes | Path | StoredText = field(repr=False)
    number: int = 0

    def open(self) -> Image.Image:
        """The image as RGB."""
        from llava_skip.vision.rgb import to_rgb  # brings torch, which scoring does without

        with self._readable():
            image = Image.open(self._file())
            image.load()
        return to_rgb(image)

    def check(self) -> None:
        """Read the header only, so that a broken image is reported before a model is loaded."""
        with self._readable():
            Image.open(self._file()).close()

    def _file(self) -> io.BytesIO | Path:
        if isinstance(self.data, Path):
            return self.data
        if isinstance(self.data, bytes):
            return io.BytesIO(self.data)
        text = self.data.read() if isinstance(self.data, StoredText) else self.data
        if text.startswith("["):  # VLMEvalKit's cell of several images
            texts = ast.literal_eval(text)
            if self.number >= len(texts):
                raise ValueError(f"image {self.number + 1} of {len(texts)} is asked for")
            text = texts[self.number]
        return io.BytesIO(base64.b64decode("".join(text.split()), validate=True))

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise UserError(f"{self.sample}: image file {error.filename} does not exist; check --images.") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
            raise UserError(f"{self.sample}: its image cannot be decoded ({error}); repair or replace it.") from error


def row_images(rows: list[Row], folder: Path) -> list[ImageSource]:
    """The image of each row, after a check that it can be opened.

    It is taken from `image` (base64, bytes, a Hugging Face `{"bytes": ...}` cell, or the index of the row that has
    the image) or else from a file named in `imagename` or `image_path`, below `folder`.

    Raises:
        UserError: naming the samples whose image is missing or broken.
    """
    owners = {row["index"]: row["image"] for row in rows if "index" in row and _is_base64(row.get("image"))}
    found, lacking = [], []
    for row in rows:
        image = _image(row, folder, owners)
        if image:
            found.append(image)
        else:
            lacking.append(_name(row))
    if lacking:
        raise UserError(
            f"{first_few(lacking)} of {len(rows)} samples have no image: expected base64 in 'image', the index of the "
            "row that has the image, or a file name in 'imagename' or 'image_path'."
        )
    missing = [str(image.data) for image in found if isinstance(image.data, Path) and not image.data.is_file()]
    if missing:
        raise UserError(
            f"{first_few(missing)} image files do not exist; looked in {folder}, set --images to their folder."
        )
    checked: set[int] = set()
    for image in found:
        if id(image.data) not in checked:  # circular copies share one image
            checked.add(id(image.data))
            image.check()
    return found


def _image(row: Row, folder: Path, owners: dict[str, str | StoredText]) -> ImageSource | None:
    cell = row.get("image")
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    if isinstance(cell, str) and 0 < len(cell) <= REFERENCE_LENGTH:
        cell = owners.get(cell)
    if cell:
        return ImageSource(_name(row), cell)
    name = row.get("imagename") or row.get("image_path")
    return ImageSource(_name(row), folder / name) if name else None


def _is_base64(cell: object) -> bool:
    return isinstance(cell, StoredText) or (isinstance(cell, str) and len(cell) > REFERENCE_LENGTH)


def _name(row: Row) -> str:
    return f"sample {row.get('index') or row.get('question_id') or row.get('id')}"
