from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.reading.images import ImageSource, row_images
from eval.reading.tables import read_rows
from llava_skip.vision.rgb import to_rgb
from llava_skip_base.errors import UserError


@pytest.mark.parametrize(
    ("mode", "color", "kind", "expected"),
    [
        ("RGB", (9, 8, 7), "PNG", (9, 8, 7)),
        ("RGBA", (9, 8, 7, 255), "PNG", (9, 8, 7)),
        ("L", 77, "PNG", (77, 77, 77)),
        ("LA", (77, 255), "PNG", (77, 77, 77)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("P", 0, "PNG", (0, 0, 0)),
        ("I;16", 257 * 50, "PNG", (50, 50, 50)),
        ("L", 128, "JPEG", (128, 128, 128)),
    ],
)
def test_every_mode_becomes_rgb(
    encoded_image: Callable[..., str], mode: str, color: object, kind: str, expected: tuple[int, int, int]
) -> None:
    image = ImageSource("sample 1", encoded_image(color, mode, kind)).open()
    assert image.mode == "RGB"
    assert image.getpixel((3, 3)) == expected


def test_cmyk_and_float() -> None:
    assert to_rgb(Image.new("CMYK", (2, 2))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.fromarray(np.full((2, 2), 40.0, np.float32))).getpixel((0, 0)) == (40, 40, 40)


def test_cell_with_an_index_takes_the_image_of_that_row(encoded_image: Callable[..., str], tmp_path: Path) -> None:
    rows = [{"index": "3", "image": encoded_image((1, 2, 3))}, {"index": "1000003", "image": "3"}]
    own, copy = row_images(rows, tmp_path)
    assert copy.data == own.data
    assert copy.open().getpixel((0, 0)) == (1, 2, 3)


def test_bytes_and_files(encoded_image: Callable[..., str], tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (5, 5, 5)).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    rows = [{"id": "a", "image": {"bytes": content, "path": None}}, {"id": "b", "imagename": "x.png"}]
    assert [one.open().getpixel((0, 0)) for one in row_images(rows, tmp_path)] == [(5, 5, 5), (5, 5, 5)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"index": "4", "image": ""}, r"1 \(sample 4\) of 1 samples have no image"),
        ({"index": "4", "image": "99"}, r"1 \(sample 4\) of 1 samples have no image"),
        ({"index": "4", "image": "!" * 80}, "sample 4: its image cannot be decoded"),
        ({"index": "4", "image": "QUJD" * 30}, "sample 4: its image cannot be decoded"),
        ({"index": "4", "imagename": "gone.png"}, r"gone.png\) image files do not exist.*--images"),
    ],
)
def test_broken_images_name_their_sample(tmp_path: Path, row: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        row_images([row], tmp_path)


def test_cut_image_is_an_error_when_used(encoded_image: Callable[..., str]) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    import base64
    import io

    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    cut = base64.b64encode(buffer.getvalue()[:3000]).decode()
    with pytest.raises(UserError, match="sample 8: its image cannot be decoded"):
        ImageSource("sample 8", cut).open()


def test_data_uris_in_a_benchmark_file(tmp_path: Path) -> None:
    """A file that users reported; alone, in a list of images, and as bytes of a parquet cell."""
    rows = read_rows(Path(__file__).parents[1] / "cases" / "eval" / "data_uri.tsv")
    sources = row_images(rows, tmp_path)
    assert {source.open().mode for source in sources} == {"RGB"} and len(sources) == len(rows) > 1
    uri = rows[0]["image"].read()
    both = ImageSource("sample 1", f"['{uri}', '{uri.partition(',')[2]}']", 1)
    assert both.open().tobytes() == sources[0].open().tobytes()
    with pytest.raises(UserError, match="sample 1: its image cannot be decoded") as caught:
        ImageSource("sample 1", uri[:900] + "!" * 5000).check()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("size", [(1, 6000), (20_000, 9)])
def test_extreme_shapes_are_refused_before_a_model_loads(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "strip.png")
    with pytest.raises(UserError, match=f"sample 7: .*{size[0]} x {size[1]} pixels are too long and narrow"):
        row_images([{"index": "7", "imagename": "strip.png"}], tmp_path)


def test_an_error_of_the_programme_about_a_cell_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(text: str) -> None:
        raise ValueError("planted")

    monkeypatch.setattr("eval.reading.images.base64_bytes", planted)
    with pytest.raises(ValueError, match="^planted$") as caught:
        ImageSource("sample 1", "QUJD" * 30).check()
    assert not isinstance(caught.value, UserError)
