import json
from pathlib import Path
from zipfile import ZipFile

import openpyxl
import pytest

from eval.reading.tables import read_rows, sha256, write_xlsx
from llava_skip_base.errors import UserError


def test_words_that_look_missing_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('index\tA\tL2-category\n1\tNone\tnan\n2\tNA\t"two\nlines"\n3\t\tnull\n')
    assert read_rows(path) == [
        {"index": "1", "A": "None", "l2_category": "nan"},
        {"index": "2", "A": "NA", "l2_category": "two\nlines"},
        {"index": "3", "A": "", "l2_category": "null"},
    ]


def test_xlsx_numbers_formulas_and_empty_cells(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for row in [[None, "index", "A", "prediction"], [0, 3.0, 12, "=A"], [1, 4, None, None]]:
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    assert read_rows(tmp_path / "a.xlsx") == [
        {"index": "3", "A": "12", "prediction": "=A"},
        {"index": "4", "A": "", "prediction": ""},
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"v1_0": "yes", "v1_1": "no"}'),
        ("a.jsonl", '{"id": "v1_0", "prediction": "yes"}\n\n{"id": "v1_1", "prediction": "no"}\n'),
        ("lines.json", '{"id": "v1_0", "prediction": "yes"}\n{"id": "v1_1", "prediction": "no"}\n'),
        ("a.csv", "id,prediction\nv1_0,yes\nv1_1,no\n"),
    ],
)
def test_forms_of_predictions(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_rows(tmp_path / name) == [{"id": "v1_0", "prediction": "yes"}, {"id": "v1_1", "prediction": "no"}]


def test_parquet_with_image_bytes(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([{"index": 1, "image": {"bytes": b"x", "path": None}, "A": None}])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == [{"index": "1", "image": {"bytes": b"x", "path": None}, "A": ""}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "a\tb\n1\n", "line 2: 1 fields, but the header has 2"),
        ("a.tsv", 'a\tb\n1\t"open\n', "is a quote open or the file cut"),
        ("a.tsv", "a\tb\n", "holds no rows"),
        ("a.tsv", "a-x\ta_x\n1\t2\n", "column names occur twice"),
        ("a.jsonl", '{"a": 1}\n{"a": ', "line 2: not valid JSON"),
        ("a.jsonl", "[1]\n", "expected a JSON object, saw list"),
        ("a.json", '[{"a": 1}', "not valid JSON"),
        ("a.json", "3", "expected a JSON list or object"),
        ("a.xlsx", "no zip", "not an Excel workbook"),
        ("a.parquet", "", "not a parquet file, or damaged"),
        ("a.parquet", "PAR1 and so on", "not a parquet file, or damaged"),
        ("a.txt", "x", "cannot read '.txt' files; give one of .tsv"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message.replace(".", r"\.")) as caught:
        read_rows(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("size", ["A1", "A1:B2", "A1:A4"])
def test_a_workbook_that_tells_a_wrong_size_is_read_whole(tmp_path: Path, size: str) -> None:
    rows = [{"index": str(n), "prediction": "AB"[n]} for n in (0, 1)]
    write_xlsx(tmp_path / "a.xlsx", ("index", "prediction"), rows)
    with ZipFile(tmp_path / "a.xlsx") as whole, ZipFile(tmp_path / "b.xlsx", "w") as wrong:
        for name in whole.namelist():
            dimension = f'<dimension ref="{size}"/><sheetData>'.encode()
            wrong.writestr(name, whole.read(name).replace(b"<sheetData>", dimension))
    assert read_rows(tmp_path / "b.xlsx") == rows


def test_missing_file_and_bad_encoding(tmp_path: Path) -> None:
    for name in ("a.tsv", "a"):
        with pytest.raises(UserError, match="no such file"):
            read_rows(tmp_path / name)
    (tmp_path / "b.tsv").write_bytes(b"a\n\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_rows(tmp_path / "b.tsv")


def test_hash_tells_names_and_contents(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("x")
    second.write_text("y")
    before = sha256([first, second])
    second.write_text("z")
    assert sha256([first, second]) != before
    second.write_text("y")
    assert sha256([first, second]) == before
    assert sha256([first]) == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    assert json.dumps(sha256([first])) != json.dumps(before)
