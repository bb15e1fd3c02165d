"""Texts of records in everything that the programs for training data print."""

import json
import sys

import pytest

from tests.support.conversations import byte_tokenizer
from tests.support.hostile import ALL, WORDS, lacking
from train import show_sample, validate_data


@pytest.fixture
def line(tmp_path, monkeypatch):
    """Arguments for a set with a record for each hostile text, as its id and its text; every second one is faulty."""
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    records = []
    for word in ALL:
        turns = [{"from": "human", "value": f"Say {word}"}, {"from": "gpt", "value": word}]
        records.append({"id": word, "conversations": turns})
        records.append({"id": word, "conversations": turns, "image": f"{word}.png"})
    (tmp_path / "data.json").write_text(json.dumps(records))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    return ["--data", "data.json", "--images", ".", "--template", "v1", "--tokenizer", "tokenizer"]


@pytest.mark.parametrize("word", ALL)
def test_validate_data(tmp_path, monkeypatch, capsys, line, word):
    turns = [{"from": word, "value": "Hi"}, {"from": "gpt", "value": "Hi"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": word, "conversations": turns}]))
    monkeypatch.setattr(sys, "argv", ["validate_data", *line, "--report", "[red].json"])
    with pytest.raises(SystemExit) as left:
        validate_data.main()
    printed = capsys.readouterr()
    assert left.value.code == 1 and printed.err == ""
    # Ids and speakers are quoted as Python does, which shows control characters as codes of its own.
    assert (word in WORDS and word.replace("\\", "\\\\") in printed.out) or repr(word).strip("'") in printed.out
    assert "findings -> [red].json" in printed.out and not any(escape in printed.out for escape in "\x1b\x9b\u202e")


@pytest.mark.parametrize("number", range(len(ALL)))
def test_show_sample(monkeypatch, capsys, line, number):
    monkeypatch.setattr(sys, "argv", ["show_sample", str(2 * number), *line, "--output", "[red]"])
    show_sample.main()
    printed = capsys.readouterr().out
    assert lacking(printed, (ALL[number],)) == []
    assert lacking(printed.replace("\n", ""), (ALL[number],)) == []
