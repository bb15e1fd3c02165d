"""Paths of images in a typed line, in the forms that terminals paste them."""

import contextlib
import time
from pathlib import Path

import pytest

from llava_skip_base.errors import UserError
from serve.dropped import take_images, typed_path


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("a.png", "two words.JPG", "it's.webp", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "names", "question"),
    [
        ("what's this?", [], "what's this?"),
        ("{0}/a.png what's this?", ["a.png"], "what's this?"),
        ("'{0}/two words.JPG' '{0}/a.png' compare  them", ["two words.JPG", "a.png"], "compare them"),
        ('what is in "{0}/two words.JPG"?', ["two words.JPG"], "what is in ?"),
        (r"{0}/two\ words.JPG and {0}/it\'s.webp", ["two words.JPG", "it's.webp"], "and"),
        ("file://{0}/two%20words.JPG which?", ["two words.JPG"], "which?"),
        ("file://localhost{0}/a.png", ["a.png"], ""),
        ("~/a.png ", ["a.png"], ""),
        ("{0}/two words.JPG ", ["two words.JPG"], ""),
        ("a.png, ./a.png. and ../ or and/or", ["a.png", "a.png"], ", . and ../ or and/or"),
        ("(a.png) [x](b) is a.png's?", ["a.png", "a.png"], "() [x](b) is 's?"),
        ('"a.png is one, and so is \'~/two words.JPG\', isn\'t it', ["a.png", "two words.JPG"],
         '" is one, and so is , isn\'t it'),
        ("is it a .png, or a JPG / png? e.g. 3/4, he/she, </b>, 5 /10, ...", [],
         "is it a .png, or a JPG / png? e.g. 3/4, he/she, </b>, 5 /10, ..."),
        ("'tis a.png or 'b'", ["a.png"], "'tis or 'b'"),
        ("{0}/notes.txt stays, and so does c.txt", [], "{0}/notes.txt stays, and so does c.txt"),
        ("file://elsewhere/a.txt [x", [], "file://elsewhere/a.txt [x"),
        ("  two\tlines  ", [], "two\tlines"),
        ("\\", [], "\\"),
    ],
)  # fmt: skip
def test_images_are_taken_out_of_a_line(place, line, names, question):
    found, rest = take_images(line.format(place))
    assert [path.resolve() for path in found] == [(place / name).resolve() for name in names]
    assert rest == question.format(place)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{0}/lost.png what?", "there is no image .*lost.png"),
        ("'{0}/lost it.png'", "there is no image .*lost it.png"),
        ("what is in ~/lost.png?", "there is no image ~/lost.png:"),
        ("file://{0}/lost.png", "there is no image .*lost"),
        ("(lost.png) what?", "there is no image lost.png:"),
        ("a.png or ../lost", r"there is no image \.\./lost"),
        ("x" * 5000 + ".png", r"there is no image x+\.\.\. "),
        ("a\0.png", "there is no image"),
        ("~nobody-has-this-name/a.png", "there is no image"),
        ("folder.png what?", "folder.png is a folder"),
        ("{0}/folder what?", "folder is a folder"),
        ("{0}/plain what?", "plain has no ending of an image"),
        ("a.png and b.HEIC?", "b.HEIC: images of the type .heic are not read"),
        ("https://host/a.png", "there is no image https"),
    ],
)  # fmt: skip
def test_what_is_written_as_an_image_and_is_none_is_named(place, line, message):
    (place / "folder.png").mkdir()
    (place / "folder").mkdir()
    (place / "plain").write_bytes(b"x")
    with pytest.raises(UserError, match=message):
        take_images(line.format(place))


@pytest.mark.parametrize("part", [".", "'", "\\", "a'", '"b" ', "(", "/x"])
def test_a_long_line_is_read_in_one_go(place, part):
    """A search that looks at the whole rest at each place would take minutes of it."""
    began = time.process_time()
    with contextlib.suppress(UserError):
        take_images(part * (100_000 if len(part) == 1 else 5_000) + "x")
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    "text", ["two words.JPG", "'two words.JPG'", r"two\ words.JPG", "{0}/two words.JPG", "file://{0}/two%20words.JPG"]
)
def test_a_whole_text_is_one_path(place, text):
    assert typed_path(text.format(place)).resolve() == (place / "two words.JPG").resolve()


@pytest.mark.parametrize(
    ("text", "path"),
    [("new file.json", "new file.json"), ("'new file.json'", "new file.json"), (r"new\ file.json", "new file.json"),
     ('"~/x.json"', "{0}/x.json"), ("file://{0}/new%20one.json", "{0}/new one.json")],
)  # fmt: skip
def test_a_new_file_has_no_quotes_in_its_name(place, text, path):
    assert typed_path(text.format(place)) == Path(path.format(place))
