"""Cells, paths and files of others that once ended an evaluation with a traceback, or showed what they must not."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.benchmarks.mmstar import MMStar
from eval.reading.images import row_images
from eval.reading.tables import read_rows
from eval.sample import as_list, printed_texts
from llava_skip_base.errors import UserError

Rows = list[dict[str, Any]]
DEEP = "[" * 200_000 + "]" * 200_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder with an image in it, one beside it, and a link to a folder elsewhere."""
    for name in ("images/in.png", "beside.png", "elsewhere/linked.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "images/link").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "images"


@pytest.mark.parametrize("column", ["image_path", "imagename"])
@pytest.mark.parametrize("name", ["../beside.png", "link/../../beside.png", "{folder}/in.png", "//etc/x.png"])
def test_an_image_outside_of_the_folder_is_refused(folder: Path, column: str, name: str) -> None:
    row = {"index": "4", column: name.format(folder=folder)}
    with pytest.raises(
        UserError, match=r"images of 1 \(sample 4: .* leaves the image folder .*below the folder of --im"
    ):
        row_images([row, {"index": "5", column: "in.png"}], folder)


def test_links_in_the_folder_are_followed(folder: Path) -> None:
    (image,) = row_images([{"index": "4", "image_path": "link/linked.png"}], folder)
    assert image.open().size == (4, 4)


def test_a_hugging_face_cell_that_names_a_file(folder: Path) -> None:
    cell = {"bytes": None, "path": "in.png"}
    (image,) = row_images([{"index": "4", "image": cell}], folder)
    assert image.open().size == (4, 4)
    with pytest.raises(UserError, match="leaves the image folder"):
        row_images([{"index": "4", "image": {"bytes": None, "path": "../beside.png"}}], folder)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("[" + "1, " * 60 + "1]", "starts with a bracket, and is no list of base64 texts"),
        ("[{[]: 1}]" + " " * 90, "starts with a bracket"),
        ("[" + "-" * 90_000 + "1]", "starts with a bracket"),
        (DEEP, "starts with a bracket"),
        ("[]" + " " * 90, "image 1 of 0 is asked for"),
        ("['" + "!" * 90 + "']", "cannot be decoded"),
    ],
)
def test_an_image_cell_that_is_no_image(folder: Path, cell: str, message: str) -> None:
    with pytest.raises(
        UserError, match=f"sample 4: its image cannot be decoded.*{message}|sample 4:.*{message}"
    ) as caught:
        row_images([{"index": "4", "image": cell}], folder)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 2500 + "x.png", "x\0y.png", "\ud83d.png"])
def test_a_name_that_no_file_can_have(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"1 \(.*\) image files do not exist") as caught:
        row_images([{"index": "4", "image_path": name}], folder)
    assert len(str(caught.value)) < 600


def test_a_path_that_no_file_can_have() -> None:
    with pytest.raises(UserError, match="no such file; check the path"):
        read_rows(Path("x" * 5000 + ".tsv"))


@pytest.mark.parametrize("text", ["[" + "-" * 90_000 + "1]", "[{[]: 1}]", DEEP, "[1, 2]", "['a', None]", "['a'"])
def test_text_that_is_no_printed_list_of_texts(text: str) -> None:
    assert printed_texts(text) is None and as_list(text) == [text]


def test_printed_lists_of_texts() -> None:
    for texts in ([], ["a"], ["it's", 'say "x"', "two\nlines", "\\", "é\u202e\x00"], ["x" * 100_000] * 3):
        assert printed_texts(str(texts)) == texts


def big(mmstar_rows: Rows) -> Rows:
    """The rows with images that stay in the file."""
    return [{**row, "image": row["image"] + " " * 100} for row in mmstar_rows]


@pytest.mark.parametrize("how", ["replaced", "rewritten", "cut", "gone", "same size and times"])
def test_a_file_that_changes_while_it_is_used(
    tmp_path: Path, write_tsv: Callable[..., Path], mmstar_rows: Rows, how: str
) -> None:
    data = write_tsv(big(mmstar_rows))
    images = [sample.images[0] for sample in MMStar().load(data)]
    assert images[3].open().getpixel((0, 0)) == (3, 0, 0)
    stat = data.stat()
    if how == "replaced":
        write_tsv(big(mmstar_rows[::-1]), "other.tsv").rename(data)
    elif how == "rewritten":
        write_tsv([{**row, "question": "?"} for row in big(mmstar_rows)])
    elif how == "cut":
        os.truncate(data, 500)
    elif how == "gone":
        data.unlink()
    else:  # the images of two questions change places
        rows = big(mmstar_rows)
        rows[3]["image"], rows[4]["image"] = rows[4]["image"], rows[3]["image"]
        write_tsv(rows)
        os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match=r"data\.tsv: has been replaced or changed since it was read"):
        images[3].open()


def test_a_file_that_only_grows_or_is_touched_keeps_its_images(
    write_tsv: Callable[..., Path], mmstar_rows: Rows
) -> None:
    data = write_tsv(big(mmstar_rows))
    images = [sample.images[0] for sample in MMStar().load(data)]
    os.utime(data, (time.time(), time.time()))
    with data.open("a") as file:
        file.write("\n")
    assert images[3].open().getpixel((0, 0)) == (3, 0, 0)
