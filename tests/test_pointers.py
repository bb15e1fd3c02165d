"""A file that git-lfs has not fetched is named as that by every reader of data."""

import pytest

from eval.reading.tables import READERS, read_rows
from llava_skip_base.images import ImageError, open_image
from train.data.reading import read_table

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.parquet"])
def test_training_data(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=f"{name} is a git-lfs pointer.*run git lfs pull"):
        read_table(str(tmp_path / name), "train")


@pytest.mark.parametrize("ending", READERS)
def test_benchmark_files_and_predictions(tmp_path, ending):
    (tmp_path / f"a{ending}").write_bytes(POINTER)
    with pytest.raises(ValueError, match=f"a{ending} is a git-lfs pointer"):
        read_rows(tmp_path / f"a{ending}")


def test_images(tmp_path):
    (tmp_path / "a.png").write_bytes(POINTER)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png")):
        with pytest.raises(ImageError, match="a git-lfs pointer, not the image itself"):
            open_image(source)
    with pytest.raises(ImageError, match="cannot identify"):
        open_image(POINTER)
