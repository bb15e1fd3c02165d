"""One item of a JSON file never takes the others with it, and lists and lines have one grammar."""

import gzip
import json
import resource

import pytest

from llava_skip_base.errors import UserError
from llava_skip_base.files import parse_json
from tests.support.records import record
from train.data import json_items as reader
from train.data import load_records
from train.data.json_items import json_items

GOOD = record((), "Größe 😀?", 'a \\ "quoted" [list], {braces}')
DEEP = f'{{"id": "deep", "x": {"[" * 100_000}{"]" * 100_000}}}'
DIGITS = '{"id": "big", "x": ' + "7" * 6000 + "}"
HALF = json.dumps(record((), "Hi \ud83d", id="half"))
FAULTS = {  # text of an item -> what its fault says, with its name
    DEEP: ("is not valid JSON: nested more than 100 levels deep", "deep"),
    DIGITS: ("is not valid JSON: a number has more than 4300 digits", "big"),
    '{"id": "open", "x": [1}': ("is not valid JSON: Expecting ',' delimiter", "open"),
    '{"id": "word", "x": yes}': ("is not valid JSON: Expecting value", "word"),
    '{"id": 5, "x": 1}}': ("is not valid JSON: Extra data", "5"),
    '{"id": "two"} {"id": "more"}': ("is not valid JSON: Extra data", "two"),
    '{"id": "raw", "x": "a\tb"}': ("is not valid JSON: Invalid control character at", "raw"),
    '{"id": "slash", "x": "\\q"}': ("is not valid JSON: Invalid \\escape", "slash"),
}


@pytest.fixture(params=["json", "jsonl", "ndjson", "JSON", "json.gz", "jsonl.gz", "JSONL.GZ"])
def write(tmp_path, request):
    """Writes items into a file of each name; in a list the n-th item is on line n as in the lines."""

    def written(items):
        texts = [item if isinstance(item, bytes) else item.encode() for item in items]
        joined = (
            b"[" + b",\n".join(texts) + b"]"
            if request.param.lower().removesuffix(".gz") == "json"
            else b"\n".join(texts)
        )
        path = tmp_path / f"data.{request.param}"
        path.write_bytes(gzip.compress(joined, mtime=0) if path.suffix.lower() == ".gz" else joined)
        return path

    return written


def test_every_fault_is_one_items_own(write):
    path = write([json.dumps(GOOD), *(text for fault in FAULTS for text in (fault, json.dumps(GOOD)))])
    items = list(json_items(path))
    assert [item.line for item in items] == list(range(1, len(items) + 1))
    assert [item.value for item in items[::2]] == [GOOD] * (len(FAULTS) + 1)
    for item, (fault, name) in zip(items[1::2], FAULTS.values(), strict=True):
        assert item.fault.startswith(fault) and item.name == name and item.value is None


def test_what_is_no_utf_8_is_one_items_own(write):
    items = list(json_items(write([json.dumps(GOOD), b'{"id": "latin", "x": "\xfc"}', json.dumps(GOOD)])))
    assert [bool(item.fault) for item in items] == [False, True, False]
    assert items[1].fault.startswith("is not valid JSON: 'utf-8' codec") and items[1].name == "latin"


def test_columns_that_nobody_reads_may_hold_anything(write):
    texts = ['{"id": 18446744073709551615, "x": NaN}', '{"x": [-Infinity, 1e999, "\\ud83d"], "id": -0.5}']
    items = list(json_items(write(texts)))
    assert [item.fault for item in items] == [None, None]
    assert items[0].value["id"] == 2**64 - 1 and items[0].value["x"] != items[0].value["x"]


def test_records_name_file_line_and_id(write):
    path = write([json.dumps(GOOD), DEEP, HALF, DIGITS])
    records = load_records(str(path))
    found = [(records.record(row)["id"], records.record(row)["fault"]) for row in range(4)]
    assert found[0] == ("r1", None) and [name for name, _ in found] == ["r1", "deep", "half", "big"]
    for line, (_, fault) in enumerate(found[1:], start=2):
        assert fault.startswith(f"{path.name}, line {line}")
    assert "half of a surrogate pair" in found[2][1]


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_is_the_same_in_pieces_of_any_size(tmp_path, monkeypatch, chunk, indent):
    rows = [GOOD, 7, "x", [], {}, GOOD, None, GOOD, GOOD]
    text = json.dumps(rows, indent=indent).replace("7", DIGITS, 1).replace("null", '{"a": "\\\\", "b": tru}')
    (tmp_path / "data.json").write_text("\ufeff \n" + text + "\r\n")
    expected = list(json_items(tmp_path / "data.json"))
    monkeypatch.setattr(reader, "_CHUNK", chunk)
    assert list(json_items(tmp_path / "data.json")) == expected
    assert [item.value for item in expected if not item.fault] == [rows[0], *rows[2:6], *rows[7:]]
    begins = [
        n for n, line in enumerate(text.split("\n"), start=2) if line[:1] == " " and line[1:2] not in (" ", "}", "]")
    ]
    assert [item.line for item in expected] == (begins if indent else [2] * len(rows))


def test_an_item_that_is_too_long_is_passed_over(write, monkeypatch):
    monkeypatch.setattr(reader, "LONGEST", 5000)
    monkeypatch.setattr(reader, "_CHUNK", 600)
    long = '{"id": "long", "x": "' + 'a \\" ] ' * 5000 + '"}'
    items = list(json_items(write([json.dumps(GOOD), long, json.dumps(GOOD)])))
    assert [item.value for item in items] == [GOOD, None, GOOD] and items[2].line == 3
    assert (items[1].line, items[1].name) == (2, "long") and "longer than" in items[1].fault


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{}", r"the record in it that begins on line 1, does not end: is the file cut\?"),
        ('[{},\n{"a": "b}]', "the record in it that begins on line 1, does not end"),
        ("[{}]\n\n{}", "line 1 goes on after the end of the list"),
        ("5", "must hold a list of conversation objects"),
        ("{", "is not valid JSON: Expecting property name"),
        (b"\x1f\x8b\x08\x00rest", "cannot be unpacked"),
        (gzip.compress(b"[{}]", mtime=0)[:-9], "cannot be unpacked"),
        ("[", "does not end"),
        ("", "is not valid JSON: Expecting value"),
    ],
)
def test_a_file_of_another_form_is_one_message(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        list(json_items(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("text", "faults"), [("[]", []), ("[{},]", [None, "beside"]), ("[,{}]", ["beside", None])])
def test_commas_without_an_item(tmp_path, text, faults):
    (tmp_path / "data.json").write_text(text)
    items = list(json_items(tmp_path / "data.json"))
    assert [item.fault and "beside" in item.fault and "beside" for item in items] == faults


def test_nesting_takes_no_memory(tmp_path):
    """In 1 GiB more than the process has; a parser without a bound took 22."""
    (tmp_path / "data.json").write_text(f"[{DEEP}, {json.dumps(GOOD)}]")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), limits[1]))
    try:
        assert [bool(item.fault) for item in json_items(tmp_path / "data.json")] == [True, False]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_half_a_character_is_for_the_reader_of_the_column():
    with pytest.raises(ValueError, match="half a character"):
        parse_json('"\\ud83d"')
    assert parse_json('"\\ud83d"', halves=True) == "\ud83d"
