"""Sources of records, and the mixture that a run reads.

A source is a table, the folder of its images, and how often its records are read in an epoch. `--data` names one file,
or a YAML that mixes several:

    sources:
      llava:
        path: llava_v1_5_mix665k.json
        images: {coco: /data/coco, gqa: /data/gqa, ocr_vqa: /data/ocr_vqa/images}
        renames: {ocr_vqa: ocrvqa_path-conversion.json}
      charts:
        path: charts.parquet
        weight: 0.5
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from llava_skip.vision.rgb import to_rgb
from llava_skip_base.errors import MissingFileError, UserError, shortened
from llava_skip_base.files import image_path, is_hub_name, read_json
from llava_skip_base.images import image_name, is_data_uri, open_image
from llava_skip_base.yaml_files import read_yaml
from train.data.reading import file_stamp, read_table, table_stamp
from train.data.records import Record, as_record
from train.data.turns import RecordError

MIX_KINDS = (".yaml", ".yml")


@dataclass(frozen=True)
class Source:
    """An entry of the mixture.

    Attributes:
        name: of the source, for messages and counts.
        path: a file, a folder or a hub name, see `train.data.reading.read_table`.
        images: the folder that image names start from, or a map from their first component to a folder; "": names
            are paths.
        renames: a JSON object of old to new names of images, or a map from the first component to such a file, for
            the names after it.
        weight: how often a record is read in an epoch; 0.5 takes half of the records, always the same ones.
        split: of a `datasets` set.
        config: of a hub set that has several.
    """

    name: str
    path: str
    images: str | dict[str, str] = ""
    renames: str | dict[str, str] | None = None
    weight: float = 1.0
    split: str = "train"
    config: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise UserError(f"source {self.name!r} has no path: give a file, a folder or a hub name.")
        if not isinstance(self.weight, (int, float)) or not 0 < self.weight < 1000:
            raise UserError(
                f"source {self.name!r} has the weight {shortened(repr(self.weight))}; it must be between 0 and 1000."
            )
        for name in ("images", "renames"):
            value = getattr(self, name) or ""
            if not all(isinstance(v, str) for v in (value.values() if isinstance(value, dict) else [value])):
                raise UserError(
                    f"source {self.name!r} has the {name} {shortened(repr(value))}; give a path, or names with paths."
                )
        for folder in self.images.values() if isinstance(self.images, dict) else [self.images]:
            if folder and not Path(folder).is_dir():
                raise MissingFileError(f"IMAGES {folder} does not exist: give the folder that image paths start from.")


def read_sources(data: str, images: str = "") -> list[Source]:
    """The sources that `--data` and `--images` name.

    Args:
        data: a mixture (.yaml), whose paths start from its own folder, or one source.
        images: for one source: a folder, or a JSON object from the first component of image names to folders.

    Raises:
        UserError: see the message.
        MissingFileError: a file or folder that does not exist.
    """
    data, images = os.path.expanduser(data), os.path.expanduser(images)
    if Path(data).suffix in MIX_KINDS:
        if images:
            raise UserError(f"--images does not go with {data}: a mixture names the image folder of each source.")
        return _read_mixture(Path(data))
    folders: str | dict[str, str] = images
    if images.endswith(".json"):
        folders = {part: os.path.expanduser(folder) for part, folder in _json_object(Path(images)).items()}
    return [Source(Path(data).stem, data, folders)]


def _read_mixture(path: Path) -> list[Source]:
    if not path.is_file():
        raise MissingFileError(f"DATA {path} does not exist: give a YAML with `sources`.")
    content = read_yaml(path)
    entries = content.get("sources") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries or set(content) != {"sources"}:
        raise UserError(f"DATA {path} must hold `sources:` alone, and under it each source's name with its fields.")
    return [_read_source(str(name), entry, path) for name, entry in entries.items()]


def _read_source(name: str, entry: Any, mixture: Path) -> Source:
    known = [f.name for f in fields(Source) if f.name != "name"]
    if not isinstance(entry, dict) or (unknown := sorted(set(map(str, entry)) - set(known))):
        seen = (
            f"the unknown fields {shortened(unknown, 200)}"
            if isinstance(entry, dict)
            else f"no fields, but {shortened(repr(entry))}"
        )
        raise UserError(f"DATA {mixture}: source {name!r} has {seen}; known fields are {', '.join(known)}.")
    placed = {key: _beside(mixture, value) for key, value in entry.items() if key in ("path", "images", "renames")}
    return Source(**{"name": name, "path": "", **entry, **placed})


def _beside(mixture: Path, value: Any) -> Any:
    """Paths of a mixture start from its folder; a name with the form of a hub name is one unless such a path exists."""
    if isinstance(value, dict):
        return {str(key): _beside(mixture, entry) for key, entry in value.items()}
    if not isinstance(value, str) or not value:
        return value
    path = mixture.parent / os.path.expanduser(value)
    return value if is_hub_name(value) and not path.exists() else str(path)


def _json_object(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist: give a JSON object of names.")
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise UserError(f"{path} must hold a JSON object whose values are strings.")
    return content


class Images:
    """Opens a source's images: from its image folders, under their new names, or from bytes in the table."""

    def __init__(self, source: Source) -> None:
        self.roots = source.images
        renames = source.renames or {}
        files = renames if isinstance(renames, dict) else {"": renames}
        self.renames = {part: _json_object(Path(file)) for part, file in files.items()}

    def path(self, name: str) -> Path:
        """The file of an image.

        Raises:
            RecordError: the name is outside the image folder, or starts with a component that has none.
        """
        name = self.renames.get("", {}).get(name, name)
        first, _, rest = name.partition("/")
        if first in self.renames:
            rest = self.renames[first].get(rest, rest)
            name = f"{first}/{rest}"
        if not self.roots:
            return Path(name)
        root, below = self.roots, name
        if isinstance(root, dict):
            if first not in root:
                shown = f"the image {image_name(name)} starts with {shortened(first)!r}"
                raise RecordError(f"{shown}, which has no folder; known: {sorted(root)}")
            root, below = root[first], rest
        try:
            return image_path(root, below)
        except UserError as error:
            raise RecordError(f"the image {error}") from None

    def open_file(self, image: Any) -> Image.Image:
        """An image whose header has been read.

        Raises:
            ImageError: see `open_image`.
            RecordError: see `path`.
        """
        file = self.file(image)
        return open_image(image["bytes"] if isinstance(image, dict) else image if file is None else file)

    def open(self, image: Any) -> Image.Image:
        """An image as upright RGB; errors as `open_file`."""
        with self.open_file(image) as opened:
            return to_rgb(opened)

    def file(self, image: Any) -> Path | None:
        """The file of an image of a record; None for one that is inside it. Errors as `path`."""
        if isinstance(image, dict):
            return None if image.get("bytes") else self.path(image["path"])
        return None if is_data_uri(image) else self.path(image)


@dataclass
class RecordSet:
    """The records that a run reads: the tables of its sources one after the other, and the order of an epoch.

    A row is the number of a record among all tables, an index its number in the epoch.

    Attributes:
        sources: the entries of the mixture.
        tables: their records, in Arrow.
        rows: [N] the row at each index; None where every row is read once.
    """

    sources: list[Source]
    tables: list[Dataset]
    rows: np.ndarray | None = None
    images: list[Images] = field(init=False)

    def __post_init__(self) -> None:
        self.tables = [table.with_format("arrow") for table in self.tables]
        self.ends = np.cumsum([len(table) for table in self.tables])
        self.images = [Images(source) for source in self.sources]
        if self.rows is None and any(source.weight != 1 for source in self.sources):
            self.rows = np.concatenate([self._share(number) for number in range(len(self.sources))])
        if not len(self):
            raise UserError(f"DATA {', '.join(source.path for source in self.sources)} has no records.")

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.rows is None else len(self.rows)

    def _share(self, number: int) -> np.ndarray:
        """Rows of a source in an epoch: all of them as often as its weight says, and a fixed choice for a fraction."""
        source, size = self.sources[number], len(self.tables[number])
        whole, part = divmod(source.weight, 1)
        chosen = np.random.default_rng(zlib.crc32(source.name.encode())).permutation(size)[: round(part * size)]
        rows = np.concatenate([np.tile(np.arange(size), int(whole)), np.sort(chosen)])
        return rows + self.ends[number] - size

    @property
    def fingerprint(self) -> str:
        """Changes whenever another record, image folder or order is read."""
        renamed = [_stamps(source.renames) for source in self.sources]
        parts = [[asdict(source) for source in self.sources], [table_stamp(t) for t in self.tables], renamed]
        order = b"" if self.rows is None else self.rows.tobytes()
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode() + order).hexdigest()[:32]

    @property
    def used_rows(self) -> np.ndarray:
        """Every row that is read in an epoch, once."""
        return np.arange(self.ends[-1]) if self.rows is None else np.unique(self.rows)

    def row(self, index: int) -> int:
        """The row at an index."""
        return index if self.rows is None else int(self.rows[index])

    def source_of(self, row: int) -> tuple[int, int]:
        """Number of the source that a row is from, and the row's number in its table."""
        number = int(np.searchsorted(self.ends, row, side="right"))
        return number, row - int(self.ends[number]) + len(self.tables[number])

    def record(self, row: int) -> Record:
        """The record of a row, in the form of `train.data.records`."""
        number, within = self.source_of(row)
        content = self.tables[number][within].to_pylist()[0]
        return as_record(content)

    def images_of(self, row: int) -> Images:
        """What opens the images of a row."""
        return self.images[self.source_of(row)[0]]

    def describe(self, row: int, record: Record) -> str:
        """A record's name for messages."""
        number, within = self.source_of(row)
        where = f" of {self.sources[number].name}" if len(self.sources) > 1 else ""
        return f"record {within}{where} (id {record['id']!r})"

    def without(self, rows: list[int]) -> RecordSet:
        """The set without some rows."""
        if not rows:
            return self
        order = np.arange(self.ends[-1]) if self.rows is None else self.rows
        return RecordSet(self.sources, self.tables, order[~np.isin(order, rows)])


def _stamps(renames: str | dict[str, str] | None) -> list[str]:
    files = renames.values() if isinstance(renames, dict) else [renames] if renames else []
    return [file_stamp(file) for file in files]


def load_tables(sources: list[Source]) -> RecordSet:
    """The records of sources; errors as `train.data.reading.read_table`."""
    return RecordSet(sources, [read_table(source.path, source.split, source.config) for source in sources])


def load_records(data: str, images: str = "") -> RecordSet:
    """The records of `--data` and `--images`; arguments and errors as `read_sources` and `load_tables`."""
    return load_tables(read_sources(data, images))
