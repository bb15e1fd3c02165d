"""Images of benchmark rows: base64 text, raw bytes or files, of any mode, given to the model as RGB."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from eval.reading.tables import REFERENCE_LENGTH, Row, StoredText
from eval.sample import Sample, printed_texts
from llava_skip_base.errors import UserError, first_few
from llava_skip_base.files import hash_file, image_path
from llava_skip_base.images import (
    MOST_PIXELS,
    ImageError,
    base64_bytes,
    data_uri_bytes,
    is_data_uri,
    open_image,
    work_pixels,
)
from llava_skip_base.texts import shortened

PLACEHOLDER = "<image>"
"""Marks where in a prompt an image goes."""
KEY_LENGTH = 16
"""Hexadecimal digits of an image's key."""
SIDE = 336
"""Pixels of a tower's side, to judge what a model makes of an image before one is loaded."""


@dataclass(frozen=True)
class ImageSource:
    """An image that is decoded only when it is used.

    Attributes:
        sample: the sample it belongs to, for messages.
        data: base64 text or a data URI (or where it is stored), encoded bytes, or the path of a file.
        number: which one it is, from 0, where the data is a list of base64 texts.
    """

    sample: str
    data: str | bytes | Path | StoredText = field(repr=False)
    number: int = 0

    def open(self) -> Image.Image:
        """The image as RGB."""
        from llava_skip.vision.rgb import to_rgb  # brings torch, which scoring does without

        try:
            with self._opened() as image:
                return to_rgb(image)
        except ImageError as error:
            raise self._fault(error) from error

    def check(self) -> None:
        """Read the header only, so that a broken image is reported before a model is loaded."""
        try:
            self._opened().close()
        except ImageError as error:
            raise self._fault(error) from error

    def key(self) -> str:
        """Which image it is: a hash of its encoded bytes, the same for a file and for base64 text of it."""
        digest = hashlib.sha256()
        try:
            source = self._source()
            if isinstance(source, Path):
                hash_file(source, digest)
            else:
                digest.update(source)
        except ImageError as error:
            raise self._fault(error) from error
        except OSError as error:
            raise UserError(f"{self.sample}: its image cannot be read ({error}); check --images.") from error
        return digest.hexdigest()[:KEY_LENGTH]

    def _opened(self) -> Image.Image:
        image = open_image(self._source())
        shapes = [work_pixels(*image.size, pads) for pads in (SIDE, None)]
        if max(shapes) > MOST_PIXELS:
            raise ImageError(f"{image.width} x {image.height} pixels are too long and narrow")
        return image

    def _fault(self, error: ImageError) -> UserError:
        if isinstance(error.__cause__, FileNotFoundError):
            return UserError(f"{self.sample}: image file {shortened(self.data)} does not exist; check --images.")
        return UserError(f"{self.sample}: its image cannot be decoded ({error}); repair or replace it.")

    def _source(self) -> bytes | Path:
        if not isinstance(self.data, str | StoredText):
            return self.data
        text = self.data.read() if isinstance(self.data, StoredText) else self.data
        if text.startswith("["):  # VLMEvalKit's cell of several images
            texts = printed_texts(text)
            if texts is None:
                raise ImageError("it starts with a bracket, and is no list of base64 texts")
            if self.number >= len(texts):
                raise ImageError(f"image {self.number + 1} of {len(texts)} is asked for")
            text = texts[self.number]
        return data_uri_bytes(text) if is_data_uri(text) else base64_bytes(text)


def image_keys(samples: Sequence[Sample]) -> dict[str, str]:
    """Which image each sample is about, by its id as a text; a sample without an image has no key.

    Raises:
        UserError: an image cannot be read any more.
    """
    known: dict[object, str] = {}  # the rows of one question share the data of its image
    for source in (source for sample in samples for source in sample.images):
        if (source.data, source.number) not in known:
            known[source.data, source.number] = source.key()
    return {str(s.id): "+".join(known[image.data, image.number] for image in s.images) for s in samples if s.images}


def row_images(rows: list[Row], folder: Path) -> list[ImageSource]:
    """The image of each row, after a check that it can be opened.

    It is taken from `image` (base64, bytes, a Hugging Face `{"bytes": ...}` cell, or the index of the row that has
    the image) or else from a file named in `imagename` or `image_path`, which must be below `folder`.

    Raises:
        UserError: naming the samples whose image is missing or broken.
    """
    owners = {row["index"]: row["image"] for row in rows if "index" in row and _is_base64(row.get("image"))}
    found, lacking, outside = [], [], []
    for row in rows:
        try:
            image = _image(row, folder, owners)
        except UserError as error:
            outside.append(f"{_name(row)}: {error}")
            continue
        if image:
            found.append(image)
        else:
            lacking.append(_name(row))
    if outside:
        raise UserError(f"images of {first_few(outside)} samples are refused; name files below the folder of --images.")
    if lacking:
        raise UserError(
            f"{first_few(lacking)} of {len(rows)} samples have no image: expected base64 in 'image', the index of the "
            "row that has the image, or a file name in 'imagename' or 'image_path'."
        )
    missing = [str(image.data) for image in found if isinstance(image.data, Path) and not os.path.isfile(image.data)]
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
    data = image_data(cell)
    if isinstance(data, str) and len(data) <= REFERENCE_LENGTH:
        data = owners.get(data)
    if data:
        return ImageSource(_name(row), data)
    name = row.get("imagename") or row.get("image_path") or (cell.get("path") if isinstance(cell, dict) else None)
    return ImageSource(_name(row), image_path(folder, name)) if name and isinstance(name, str) else None


def image_data(cell: object) -> str | bytes | StoredText | None:
    """What a cell holds of an image itself, by itself or as Hugging Face stores it; None if it holds none."""
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    return cell if cell and isinstance(cell, str | bytes | StoredText) else None


def _is_base64(cell: object) -> bool:
    return isinstance(cell, StoredText) or (isinstance(cell, str) and len(cell) > REFERENCE_LENGTH)


def _name(row: Row) -> str:
    return f"sample {shortened(row.get('index') or row.get('question_id') or row.get('id'))}"
