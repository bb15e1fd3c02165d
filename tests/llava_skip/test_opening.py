"""Images have one opener: what is valid is read whatever else its file says, and every fault is one named error."""

import base64
import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import BlpImagePlugin, EpsImagePlugin, ExifTags, Image, JpegImagePlugin

from llava_skip import LlavaSkipProcessor
from llava_skip.vision.rgb import is_turned, load_rgb, to_rgb, upright_size
from llava_skip_base import images
from llava_skip_base.errors import UserError
from llava_skip_base.images import FORMATS, ImageError, base64_bytes, calling_pillow, open_image, orientation
from tests.support.conversations import byte_tokenizer
from tests.support.small_models import small_config

PICTURES = Path(__file__).parents[1] / "cases" / "pictures"


def encoded(image=None, kind="PNG", **options):
    content = io.BytesIO()
    (image or Image.new("RGB", (4, 2), (200, 9, 9))).save(content, kind, **options)
    return content.getvalue()


@pytest.mark.parametrize("source", ["path", "text", "bytes", "data URI"])
def test_a_path_bytes_and_a_data_uri_are_the_same(tmp_path, source):
    content = encoded()
    (tmp_path / "a.png").write_bytes(content)
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    given = {"path": tmp_path / "a.png", "text": str(tmp_path / "a.png"), "bytes": content, "data URI": uri}
    assert load_rgb(given[source]).tobytes() == Image.new("RGB", (4, 2), (200, 9, 9)).tobytes()


def test_of_exif_data_only_the_orientation_counts():
    """A photo whose other fields have types that Pillow cannot write again."""
    photo = PICTURES / "exif_wrong_types.jpg"
    with open_image(photo) as opened:
        turned, size = is_turned(opened), upright_size(opened)
    found = load_rgb(photo)
    assert found.size == size and turned == (size != Image.open(photo).size)


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation(turn):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    square = Image.frombytes("L", (2, 2), bytes([10, 20, 30, 40]))
    with open_image(encoded(square, exif=exif)) as opened:
        found = to_rgb(opened).getchannel("R").tobytes()
    corners = {1: (10, 20, 30, 40), 2: (20, 10, 40, 30), 3: (40, 30, 20, 10), 4: (30, 40, 10, 20), 5: (10, 30, 20, 40),
               6: (30, 10, 40, 20), 7: (40, 20, 30, 10), 8: (20, 40, 10, 30)}  # fmt: skip
    assert tuple(found) == corners[turn]


@pytest.mark.parametrize("value", [0, 9, 99, 6.5, "six", b"6", (6, 6)])
def test_an_orientation_that_is_none_is_upright(value, monkeypatch):
    image = Image.new("RGB", (2, 3))
    monkeypatch.setattr(image, "getexif", lambda: {ExifTags.Base.Orientation: value})
    assert orientation(image) == 1 and to_rgb(image).size == (2, 3)


@pytest.mark.parametrize("error", [SyntaxError("broken"), struct.error("short"), KeyError(7), TypeError("no")])
def test_exif_data_that_cannot_be_read_does_no_harm(error, monkeypatch):
    def broken():
        raise error

    image = Image.new("RGB", (2, 3))
    monkeypatch.setattr(image, "getexif", broken)
    assert to_rgb(image).size == (2, 3)


def test_only_named_formats_are_tried(monkeypatch):
    def started(*_):
        raise AssertionError("it was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    monkeypatch.setattr(BlpImagePlugin.BlpImageFile, "_open", started)
    for content in (encoded(kind="EPS"), b"BLP2" + bytes(200), encoded(kind="DDS"), b"text"):
        with pytest.raises(ImageError, match=r"cannot identify image file \(tried: .*JPEG"):
            load_rgb(content)


@pytest.mark.parametrize("kind", sorted(set(FORMATS) - {"DIB"}))
def test_each_named_format_is_read(kind):
    mode = "P" if kind == "GIF" else "RGB"
    image = Image.new(mode, (16, 16))
    found = load_rgb(encoded(image, kind))
    assert (found.size, found.mode) == ((16, 16), "RGB")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("decoder"), NotImplementedError("kind"), AttributeError("_x"), KeyError("x"), MemoryError(),
     OverflowError("big"), zlib.error("bad"), EOFError(), AssertionError(), RecursionError("deep")],
)  # fmt: skip
def test_whatever_a_decoder_raises_is_a_fault_of_the_image(error, monkeypatch):
    def broken(*_):
        raise error

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", broken)
    with pytest.raises(ImageError, match=".") as caught:
        load_rgb(encoded(kind="JPEG"))
    assert caught.value.__cause__ is error and isinstance(caught.value, UserError)


def test_what_is_no_fault_of_an_image_keeps_its_traceback():
    with pytest.raises(KeyboardInterrupt), calling_pillow():
        raise KeyboardInterrupt
    with pytest.raises(StopIteration), calling_pillow():
        raise StopIteration


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data:image/png;base64", "must have the form data:image/png;base64,"),
        ("data:image/png,abc", "must have the form"),
        ("data:image/png;base64,!!!!", "is not base64"),
        ("data:image/png;base64,ü", "is not base64"),
        ("data:image/svg+xml;base64,PHN2Zz4=", "cannot identify image file"),
    ],
)
def test_broken_data_uris_have_short_messages(text, message):
    with pytest.raises(ImageError, match=message) as caught:
        open_image(text + ("" if "svg" in text else "x" * 5000))
    assert len(str(caught.value)) < 250


def test_white_space_and_escapes_in_base64():
    content = encoded()
    text = base64.b64encode(content).decode()
    assert base64_bytes(f" {text[:40]}\n\t{text[40:]} ") == content
    assert base64_bytes(text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")) == content


def processor(do_pad):
    config = small_config(vocab_size=400)
    config.image_token_index = 3
    config.vision_config.image_size, config.vision_config.patch_size = 336, 112
    made = LlavaSkipProcessor.for_config(config, byte_tokenizer(), "v1")
    made.image_processor.do_pad = do_pad
    return made


@pytest.mark.parametrize(
    ("do_pad", "size", "fits"),
    [
        (False, (1, 6000), False), (True, (1, 6000), True), (False, (6000, 1), False), (False, (4, 6000), True),
        (True, (1, 20_000), False), (True, (13_000, 13_000), True), (False, (1, 200), True), (True, (1, 1), True),
        (False, (0, 5), True),
    ],
)  # fmt: skip
def test_extreme_shapes_are_refused_where_they_cost_too_much(do_pad, size, fits):
    if fits:
        processor(do_pad).check_image_size(*size)
        return
    with pytest.raises(UserError, match=f"{size[0]} x {size[1]} pixels would become .* million, "):
        processor(do_pad).check_image_size(*size)


def test_formats_that_pillow_lacks_are_left_out(monkeypatch):
    images._formats.cache_clear()
    monkeypatch.delitem(Image.OPEN, "AVIF")
    assert "AVIF" not in images._formats() and "PNG" in images._formats()
    images._formats.cache_clear()
