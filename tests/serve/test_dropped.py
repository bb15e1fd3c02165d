"""Paths of images in a typed line, in the forms that terminals paste them."""

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
        ("a.png, ./a.png. and ../nothing", ["a.png", "a.png"], ", . and ../nothing"),
        ("'tis a.png or 'b'", ["a.png"], "'tis or 'b'"),
        ("{0}/notes.txt stays, and so does c.png", [], "{0}/notes.txt stays, and so does c.png"),
        ("file://elsewhere/a.txt [x", [], "file://elsewhere/a.txt [x"),
        ("  two\tlines  ", [], "two\tlines"),
        ("\\", [], "\\"),
        ("x" * 5000 + ".png", [], "x" * 5000 + ".png"),
        ("a\0.png", [], "a\0.png"),
    ],
)  # fmt: skip
def test_images_are_taken_out_of_a_line(place, line, names, question):
    found, rest = take_images(line.format(place))
    assert [path.resolve() for path in found] == [(place / name).resolve() for name in names]
    assert rest == question.format(place)


@pytest.mark.parametrize("line", ["{0}/lost.png what?", "'{0}/lost it.png'", "~/lost.png", "file://{0}/lost.png"])
def test_a_clear_path_that_leads_nowhere_is_named(place, line):
    with pytest.raises(UserError, match="there is no image .*lost"):
        take_images(line.format(place))


@pytest.mark.parametrize(
    "text", ["two words.JPG", "'two words.JPG'", r"two\ words.JPG", "{0}/two words.JPG", "file://{0}/two%20words.JPG"]
)
def test_a_whole_text_is_one_path(place, text):
    assert typed_path(text.format(place)).resolve() == (place / "two words.JPG").resolve()
    assert typed_path("new file.json") == Path("new file.json")
