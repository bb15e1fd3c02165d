import base64
import csv
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from PIL import Image

from eval.benchmarks.mmbench import MMBench, llava_prompt, lmms_eval_prompt
from eval.benchmarks.mmstar import MMStar
from eval.benchmarks.mmvet import MMVet
from eval.reading.tables import CELL_LIMIT, StoredText, read_rows
from eval.score import score_file
from llava_skip_base.errors import UserError
from tests.support.predictions import write_predictions as write_rows

Rows = list[dict[str, Any]]
Write = Callable[..., Path]
PERFECT = {7: "A", 9: "C", 1000007: "B", 1000009: "A", 2000009: "B"}


def noise_png(seed: int, side: int) -> str:
    image = Image.frombytes("L", (side, side), bytes((seed * 7919 + n * n) % 251 for n in range(side * side)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_large_tsv_is_not_held_in_memory(tmp_path: Path) -> None:
    # 40 MB of images; a reader that keeps them, or the file, needs at least that.
    cell, rows = noise_png(1, 512), 120
    path, small = tmp_path / "large.tsv", tmp_path / "small.tsv"
    for file, count in ((path, rows), (small, 1)):
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out, delimiter="\t")
            writer.writerow("index question answer category l2_category image".split())
            for number in range(count):
                writer.writerow([number, "Was\nist\u2028das?", "A", "math", "geometry", cell])
    MMStar().load(small)  # what is imported on the way stays in memory, whatever the size
    assert path.stat().st_size > 40_000_000
    tracemalloc.start()
    samples = MMStar().load(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8_000_000, peak
    assert held < 1_000_000, held
    assert [sample.id for sample in samples] == list(range(rows))
    assert samples[-1].fields["question"] == "Was\nist\u2028das?"
    assert samples[-1].images[0].open().size == (512, 512)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_stored_images_are_found_again(tmp_path: Path, newline: str, mark: str) -> None:
    cells = [noise_png(seed, 8 + seed) for seed in range(5)]
    path = tmp_path / "a.csv"
    lines = [f'{n},"größe, ""{n}""\n\n",{cell}' for n, cell in enumerate(cells)]
    path.write_bytes((mark + newline.join(["index,question,image", *lines[:2], "", *lines[2:]])).encode())
    rows = read_rows(path)
    assert [row["index"] for row in rows] == list("01234")
    stored = [row["image"] for row in rows]
    assert all(isinstance(cell, StoredText) for cell in stored)
    assert [cell.read() for cell in stored] == cells


@pytest.mark.parametrize("where", [0, 1])
def test_doubled_json_ids_are_refused(tmp_path: Path, where: int) -> None:
    text = ['{"v1_0": "yes", "v1_1": "no", "v1_0": "no"}', '[{"id": 1, "prediction": "a", "prediction": "b"}]'][where]
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=f"occur more than once: 1 .{['v1_0', 'prediction'][where]}"):
        read_rows(tmp_path / "a.json")


def test_truncated_predictions_say_where(tmp_path: Path, write_tsv: Write, mmbench_rows: Rows) -> None:
    lines = [json.dumps({"question_id": index, "text": text}) for index, text in PERFECT.items()]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines)[:-9])
    with pytest.raises(UserError, match=r"p\.jsonl, line 5: not valid JSON"):
        score_file(MMBench(), path, write_tsv(mmbench_rows), True, None)


@pytest.mark.parametrize("word", ["None", "nan", "NaN", "NA", "null", "N/A"])
@pytest.mark.parametrize("suffix", ["tsv", "xlsx", "jsonl"])
def test_an_option_that_reads_like_nothing(tmp_path: Path, mmbench_rows: Rows, word: str, suffix: str) -> None:
    # Question 9 gets the option instead of "snow", which is gold in every pass.
    for row in mmbench_rows:
        row |= {letter: word for letter in "ABC" if row[letter] == "snow"}
    rows = [{**row, "image": "", "prediction": PERFECT[row["index"]]} for row in mmbench_rows]
    rows[2]["prediction"] = f"The right one is {word}"  # options of question 7 are other words
    path = write_rows(tmp_path / f"p.{suffix}", rows)
    score = score_file(MMBench(), path, None, False, None)
    assert (score.scores["dev"]["hits"], score.counts["gold_not_an_option"]) == (1, 0)
    marked = word.lower() in ("nan", "none")
    assert score.counts["options_that_read_nan"] == (3 if marked else 0)
    assert any("LLaVA's prompt leaves it" in note for note in score.notes) is marked
    fields = {"question": "?", "A": "sun", "B": word, "C": "rain", "D": "", "answer": "A"}
    assert (f"\nB. {word}\nC. rain" in llava_prompt(fields, False)) is not marked  # LLaVA stops at such a word
    assert (f"\nB. {word}\n" in lmms_eval_prompt(fields, False)) is (word != "nan")


def test_missing_options_marked_as_nan_are_none(tmp_path: Path, mmbench_rows: Rows) -> None:
    rows = [{**row, "image": "", "C": row["C"] or "nan", "D": "nan", "prediction": "nan"} for row in mmbench_rows]
    score = score_file(MMBench(), write_rows(tmp_path / "p.jsonl", rows), None, False, None)
    assert score.counts["options_that_read_nan"] == 0
    assert score.counts["unresolved"] == 5  # a missing option's "nan" is no text that an answer could name


def test_formulas_and_control_characters_survive(tmp_path: Path, write_tsv: Write, mmbench_rows: Rows) -> None:
    answers = {7: "=A", 9: "@C\t", 1000007: "+1 B", 1000009: "A \x07\x00", 2000009: "-B"}
    predictions = write_rows(tmp_path / "p.jsonl", [{"index": i, "prediction": t} for i, t in answers.items()])
    data, sent = write_tsv(mmbench_rows), tmp_path / "sent.xlsx"
    score = score_file(MMBench(), predictions, data, False, None, sent)
    assert any("1 cells had control characters" in note for note in score.notes)
    sheet = openpyxl.load_workbook(sent).active
    assert [cell.data_type for cell in sheet["G"][1:]] == ["s"] * 5
    assert [cell.value for cell in sheet["G"][1:]] == ["=A", "@C\t", "+1 B", "A ", "-B"]
    again = score_file(MMBench(), sent, data, False, None)
    assert again.scores == score.scores


def test_an_answer_of_100_kb(tmp_path: Path, write_tsv: Write, mmbench_rows: Rows) -> None:
    long = "because " * 13_000
    answers = PERFECT | {9: f"C {long}", 2000009: f"{long} B"}
    predictions = write_rows(tmp_path / "p.tsv", [{"index": i, "prediction": t} for i, t in answers.items()])
    score = score_file(MMBench(), predictions, write_tsv(mmbench_rows), False, None, tmp_path / "sent.xlsx")
    assert score.scores["dev"]["vanilla"]["all_rows"] == 0.8  # a letter so far from the end does not count
    assert any("2 cells were cut" in note for note in score.notes)
    lengths = [len(row["prediction"]) for row in read_rows(tmp_path / "sent.xlsx")]
    assert max(lengths) == CELL_LIMIT


def test_empty_answers_are_counted(tmp_path: Path, write_tsv: Write, mmbench_rows: Rows) -> None:
    rows = [{"index": i, "prediction": text if i < 10 else ["", " ", None][i % 3]} for i, text in PERFECT.items()]
    score = score_file(MMBench(), write_rows(tmp_path / "p.jsonl", rows), write_tsv(mmbench_rows), False, None)
    assert (score.counts["empty"], score.counts["missing"], score.score) == (3, 0, 0.0)


def test_lookalike_letters_are_wrong_and_told(tmp_path: Path, write_tsv: Write, mmbench_rows: Rows) -> None:
    rows = [{"index": i, "prediction": text if i != 7 else "\u0410"} for i, text in PERFECT.items()]
    score = score_file(MMBench(), write_rows(tmp_path / "p.jsonl", rows), write_tsv(mmbench_rows), False, None)
    assert (score.counts["lookalike_letters"], score.score) == (1, 50.0)
    assert any("1 answers are a letter of another alphabet" in note for note in score.notes)


@pytest.mark.parametrize("cell", ["!!!not base64!!!" * 20, "QUJD" * 40, "iVBORw0KGgo" * 20])
def test_broken_base64_names_the_sample(write_tsv: Write, mmstar_rows: Rows, cell: str) -> None:
    mmstar_rows[3]["image"] = cell
    with pytest.raises(UserError, match="sample 3: its image cannot be decoded"):
        MMStar().load(write_tsv(mmstar_rows))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_images_of_every_mode_become_rgb(write_tsv: Write, mmstar_rows: Rows, mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (9, 5)).save(buffer, "TIFF" if mode in ("CMYK", "F") else "PNG")
    mmstar_rows[3]["image"] = base64.b64encode(buffer.getvalue()).decode()
    image = MMStar().load(write_tsv(mmstar_rows))[3].images[0].open()
    assert (image.mode, image.size) == ("RGB", (9, 5))


def test_wrong_columns_of_a_prediction_file(tmp_path: Path, write_tsv: Write, mmbench_rows: Rows) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"index": 7, "respond": "A"}])
    with pytest.raises(UserError, match="expected the answers in a column prediction or text; the first row has index"):
        score_file(MMBench(), path, write_tsv(mmbench_rows), False, None)
    path = write_rows(tmp_path / "p.jsonl", [{"number": 7, "prediction": "A"}])
    with pytest.raises(UserError, match="a row has no id: expected a value in index or question_id or id"):
        score_file(MMBench(), path, write_tsv(mmbench_rows), False, None)


@pytest.mark.parametrize("cell", [["B"], {"text": "B"}])
@pytest.mark.parametrize("column", ["A", "question", "prediction"])
def test_lists_in_place_of_texts_are_refused(tmp_path: Path, mmbench_rows: Rows, column: str, cell: Any) -> None:
    rows = [{**row, "image": "", "prediction": "A", column: cell} for row in mmbench_rows]
    with pytest.raises(UserError, match="lists or objects; expected texts"):
        score_file(MMBench(), write_rows(tmp_path / "p.jsonl", rows), None, False, None)


def test_grades_that_occur_twice(tmp_path: Path, mmvet_data: Path) -> None:
    path = write_rows(tmp_path / "g.jsonl", [{"id": "v1_0", "score": 1}, {"id": 0, "score": 0}])
    with pytest.raises(UserError, match="1 graded ids occur more than once"):
        score_file(MMVet(), path, mmvet_data, False, None)
