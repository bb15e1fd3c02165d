import json
import sys

import numpy as np
import pytest
from PIL import Image

from tests.support.conversations import byte_tokenizer, random_image
from tests.support.records import record
from train.show_sample import OUTLINE, SUPERVISED, main


@pytest.fixture
def line(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    random_image(40, 30).save(tmp_path / "a.png")
    (tmp_path / "data.json").write_text(json.dumps([record((), "Only text"), record()]))
    return [
        "--data", str(tmp_path / "data.json"), "--images", str(tmp_path), "--template", "v1",
        "--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "shown"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("sv-llava-100", "patches that the class token attends to"),
        ("sv-llava-hd", "tokens of the thumbnail"),
        ("sv-cos", "queries on windows of"),
        ("llava", "dense: all"),
    ],
)
def test_an_image_with_what_is_retained(tmp_path, monkeypatch, capsys, line, preset, words):
    monkeypatch.setattr(sys, "argv", ["show_sample", "1", *line, "--preset", preset])
    monkeypatch.setenv("COLUMNS", "200")
    main()
    printed = capsys.readouterr().out
    assert words in printed and "image tokens]" in printed and "USER:" in printed
    pixels = np.asarray(Image.open(tmp_path / "shown" / "1-0.png"))
    outlined = bool((pixels == OUTLINE).all(axis=2).any())
    assert outlined == (preset != "llava")
    assert (pixels.shape[1] > pixels.shape[0]) == (preset == "sv-llava-hd")  # the thumbnail and its tiles


def test_a_faulty_record_is_one_message(tmp_path, monkeypatch, capsys, line):
    (tmp_path / "data.json").write_text(json.dumps([record(text="no placeholder")]))
    monkeypatch.setattr(sys, "argv", ["show_sample", "0", *line])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: record 0 (id 'r1'): 1 images, but 0 <image> in the text")


def test_text_alone_and_its_colours(tmp_path, monkeypatch, capsys, line):
    monkeypatch.setattr(sys, "argv", ["show_sample", "0", *line])
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    main()
    printed = capsys.readouterr().out
    assert SUPERVISED == "bold green" and "\x1b[1;32m This.</s>" in printed and not (tmp_path / "shown").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["2"], "There is no sample 2: the set has 2"),
        (["x"], "Name the sample first"),
        (["0", "--templat", "v1"], "unknown arguments: --templat v1. Did you mean --template?"),
    ],
)
def test_mistakes(monkeypatch, capsys, line, words, message):
    monkeypatch.setattr(sys, "argv", ["show_sample", *words, *line])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and message in capsys.readouterr().err
