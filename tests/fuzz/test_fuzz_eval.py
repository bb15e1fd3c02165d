"""Random damage to everything that evaluation reads: nothing but the declared exceptions escapes.

Seeded, so that a failure can be repeated; FUZZ_ROUNDS multiplies the number of tries.
"""

import base64
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from eval.answering.answers import AnswerLog
from eval.benchmark import match
from eval.benchmarks import BENCHMARKS, get_benchmark
from eval.overview import Overview, by_category, percent
from eval.reading.lmms_logs import plain_rows
from eval.reading.tables import read_rows
from eval.score import score_file
from eval.scoring.judge import _content, _TryAgain, parse_retry_after, read_replies
from eval.showing.pages import collect_questions
from eval.showing.results import Result
from llava_skip_base.errors import UserError
from tests.support.predictions import write_predictions

ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "1"))


def picture() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 8, 7)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


IMAGE = picture()
OPTIONS = {"A": "cat", "B": "dog", "C": "nan", "D": ""}
ROWS: dict[str, list[dict[str, Any]]] = {
    "mmbench": [
        {"index": n, "question": "Which?", "hint": "x", **OPTIONS, "answer": "A", "category": "c", "l2-category": "d"}
        for n in (7, 1000007)
    ],
    "mmvet": [{"id": "v1_0", "question": "?", "answer": "a<AND>b", "capability": ["rec", "ocr"]}],
    "mmstar": [
        {"index": n, "question": "?\nOptions: A: one, B: two", "answer": "A", "category": "math", "l2_category": "g"}
        for n in range(2)
    ],
    "mme": [{"category": "OCR", "image_path": "OCR/1.png", "question": q, "answer": "Yes"} for q in ("a", "b")],
    "textvqa": [
        {"question_id": n, "image_id": "a", "question": f"q{n}", "answers": ["x"] * 10, "ocr_tokens": ["y"]}
        for n in range(2)
    ],
    "mmmu": [
        {"id": "validation_Art_1", "question": "<image 1>?", "options": "['a', 'b']", "answer": "A", "split": "dev"},
        {"id": "validation_Art_2", "question": "?", "options": "[]", "answer": "['1', '2']", "question_type": "open"},
    ],
    "mathvista": [
        {"pid": "1", "question": "?", "question_type": "multi_choice", "answer_type": "text", "choices": ["1", "2"],
         "answer": "1", "metadata": {"task": "t", "skills": ["s"]}, "precision": None, "unit": None},
        {"pid": "2", "question": "?", "question_type": "free_form", "answer_type": "float", "choices": None,
         "answer": "1.5", "metadata": {"task": "t", "skills": ["s"]}, "precision": 1, "unit": "m"},
    ],
    "ocrbench": [
        {"id": 1, "dataset_name": "d", "question": "?", "answers": ["a"], "type": "Handwriting Recognition"},
        {"id": 2, "dataset_name": "HME100k", "question": "?", "answers": ["a"], "type": "Doc-oriented VQA"},
    ],
    "gqa": [
        {"questionid": "1", "imageid": "1", "question": "?", "answer": "yes", "isbalanced": True,
         "types": {"structural": "verify", "semantic": "rel"}},
    ],
    "pope": [
        {"question_id": n, "image": "a.jpg", "text": f"Is {n}?", "label": "yes", "category": "random"} for n in range(2)
    ],
    "scienceqa": [{"id": str(n), "question": "?", "hint": "x", "choices": ["a", "b"], "answer": n} for n in range(2)],
    "seedimage": [
        {"question_id": f"1{n}", "question": "?", "choice_a": "a", "choice_b": "b", "choice_c": "c", "choice_d": "d",
         "answer": "A", "question_type_id": 1, "data_type": "image", "data_id": "1.png"} for n in range(2)
    ],
    "vizwiz": [
        {"image": f"{n}.jpg", "question": "?", "answers": [{"answer": "a"}] * 10, "answerable": 1, "answer_type": "x"}
        for n in range(2)
    ],
    "vqav2": [
        {"question_id": n, "image_id": 1, "question": "?", "answers": [{"answer": "a", "answer_id": 1}] * 10,
         "answer_type": "other"} for n in range(2)
    ],
    "ai2d": [{"question": "?", "options": ["a", "b"], "answer": str(n)} for n in range(2)],
    "chartqa": [{"imgname": "1.png", "query": "?", "label": str(n)} for n in range(2)],
    "docvqa": [
        {"questionId": n, "question": "?", "image": "documents/1.png", "answers": ["a"], "question_types": ["form"]}
        for n in range(2)
    ],
    "hallusionbench": [
        {"category": "VD", "subcategory": "map", "visual_input": "1", "set_id": "0", "figure_id": "0",
         "question_id": str(n), "question": "?", "gt_answer": "1", "gt_answer_details": "x", "filename": "./1.png"}
        for n in range(2)
    ],
}  # fmt: skip
HOSTILE: tuple[Any, ...] = (
    None, True, 0, -1, 7, 1.5, float("nan"), float("inf"), 10**18, 10**4000, "", " ", "nan", "None", [], {}, [[]],
    [None], ["a"], [1], {"a": 1}, {"bytes": None}, {"bytes": "x"}, {"bytes": 7, "path": 7}, {"path": "../x.png"},
    [{"bytes": "x"}], "../x.png", "/etc/passwd", "x" * 5000, "a/" * 3000, "1" * 5000, "1" * 900, "[" * 20_000, "[1,1]",
    "[{[]: 1}]", "[" + "-" * 9000 + "1]", "['a', 'b']", "['" + IMAGE + "']", "{'a': 1}", '{"structural": []}', "\x00",
    "\x1b[31m", "[/b]", "<image>", "<image 9>", "<image 99999999999>", "²", "٣", "é", "A", "yes", "1e999", "1.5", "-0",
    "Options:", "Options: A: x, B: y", IMAGE, IMAGE[:-9], "!" * 90,
)  # fmt: skip
BITS = (
    b"[" * 3000, b'{"a":' * 200, b"9" * 5000, rb"\ud83d", b"\x00", b'"', b"\t", b"\n", b"\r", b",", b"\\", b"\xff",
    b"null", b"NaN", b"-", b"]", b"}", b"1e999", b"<", b"&", b"PK", b"'",
)  # fmt: skip


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Content with a few random changes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 4, 40))
        kind = rng.randrange(5)
        if kind == 0:
            data[place : place + size] = rng.choice(BITS)
        elif kind == 1:
            data[place:place] = rng.choice(BITS)
        elif kind == 2:
            del data[place : place + size]
        elif kind == 3 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 4 and rng.random() < 0.3:
            del data[place:]
    return bytes(data)


def tries(seed: str, count: int) -> Callable[[Callable[[random.Random], Any]], None]:
    """Call a function `count * ROUNDS` times, each with random numbers of its own; what escapes names its seed."""

    def go(step: Callable[[random.Random], Any]) -> None:
        for number in range(count * ROUNDS):
            try:
                step(random.Random(f"{seed} {number}"))
            except UserError as error:
                assert 0 < len(str(error)) < 3000, f"{seed} {number}: {len(str(error))} characters"
            except Exception as error:
                raise AssertionError(f"{seed}, try {number}: {type(error).__name__}: {str(error)[:300]}") from error

    return go


def written(path: Path, rows: list[dict[str, Any]]) -> bytes:
    """The bytes of rows in the format of a suffix."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [
            list(rows[0]),
            *([f'"{str(cell).replace(chr(34), chr(34) * 2)}"' for cell in row.values()] for row in rows),
        ]
        path.write_text("\n".join(map(",".join, lines)))
    else:
        write_predictions(path, rows)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("suffix", "count"), [("tsv", 100), ("csv", 60), ("json", 100), ("jsonl", 100), ("xlsx", 25), ("parquet", 50)]
)
def test_tables(tmp_path: Path, suffix: str, count: int) -> None:
    path = tmp_path / f"data.{suffix}"
    rows = [{"index": n, "question": f"Is it {n}?", "image": IMAGE * 3, "prediction": 'a "b"\nc'} for n in range(4)]
    whole = written(path, rows)

    def step(rng: random.Random) -> None:
        path.write_bytes(damaged(whole, rng))
        for row in read_rows(path):
            json.dumps(row, default=str)

    tries(f"tables {suffix}", count)(step)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / "data.json"
    (tmp_path / "images/OCR").mkdir(parents=True)
    for image in ("a.jpg", "1.jpg", "OCR/1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / image)

    def step(rng: random.Random) -> None:
        rows = [{"image": IMAGE, **row} for row in ROWS[name]]
        for _ in range(rng.choice((1, 1, 2, 3))):
            row = rng.choice(rows)
            column = rng.choice([*row, "image_path", "hint", "split", "D", "types", "index", "image_2"])
            for changed in rows if rng.random() < 0.5 else [row]:
                changed[column] = rng.choice(HOSTILE)
        if rng.random() < 0.1:
            rng.choice(rows).pop(rng.choice(list(rows[0])), None)
        path.write_text(json.dumps(rows))
        kind = BENCHMARKS[name]
        benchmark = get_benchmark(name, rng.choice(list(kind.rules)), rng.choice(kind.protocols))
        samples = benchmark.load(path, with_images=rng.random() < 0.7)
        benchmark.prompts(samples)
        for sample in samples:
            json.dumps(sample.fields)
            for image in sample.images:
                image.open()
        answers = {sample.id: str(rng.choice(HOSTILE)) for sample in samples}
        score = benchmark.score(samples, match(samples, answers)[0])
        json.dumps([score.scores, score.counts, score.notes])

    tries(f"benchmark {name}", 40)(step)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prediction_files(tmp_path: Path, name: str) -> None:
    data, path = tmp_path / "data.json", tmp_path / "p.jsonl"
    data.write_text(json.dumps(ROWS[name]))
    log = {"filtered_resps": ["A"], "arguments": [["Which?"]], "doc": {"question": "Which?"}}

    def step(rng: random.Random) -> None:
        rows = [{**row, "prediction": "A"} for row in ROWS[name]]
        if rng.random() < 0.3:
            rows = [{**log, "doc_id": n, "target": "A", "metrics": row} for n, row in enumerate(rows)]
        for _ in range(rng.choice((1, 2, 3))):
            row = rng.choice(rows)
            column = rng.choice([*row, "index", "doc_id", "score", "extraction", "res", "prompt", "text"])
            for changed in rows if rng.random() < 0.5 else [row]:
                changed[column] = rng.choice(HOSTILE)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        benchmark = get_benchmark(name, rng.choice(list(BENCHMARKS[name].rules)))
        score_file(benchmark, path, data if rng.random() < 0.6 else None, rng.random() < 0.5, None)

    tries(f"predictions {name}", 40)(step)


def test_logs_of_lmms_eval() -> None:
    def step(rng: random.Random) -> None:
        row = {"doc_id": 1, "filtered_resps": [["A"]], "input": "?", "arguments": [["?"]], "doc": {"a": 1}, "s": {}}
        row[rng.choice(list(row))] = rng.choice(HOSTILE)
        plain_rows([row])

    tries("logs", 100)(step)


def test_saved_answers(tmp_path: Path) -> None:
    identity = {"benchmark": "mmstar", "batch_size": 2}
    with AnswerLog(tmp_path, identity) as log:
        log.append([{"index": n, "prompt": "?", "prediction": "A", "category": "c"} for n in range(3)])
    files = {name: (tmp_path / name).read_bytes() for name in ("answers.jsonl", "run.json")}

    def step(rng: random.Random) -> None:
        for name, content in files.items():
            (tmp_path / name).write_bytes(damaged(content, rng) if rng.random() < 0.6 else content)
        if rng.random() < 0.2:
            (tmp_path / "run.json").write_text(json.dumps(rng.choice(HOSTILE)))
        if rng.random() < 0.2:
            answer = {"index": rng.choice(HOSTILE), "prediction": rng.choice(HOSTILE)}
            (tmp_path / "answers.jsonl").write_text(json.dumps(answer) + "\n")
        with AnswerLog(tmp_path, identity) as log:
            log.sort([2, 1, 0])
            json.dumps([answer["prediction"].strip() for answer in log.answers.values()])

    tries("answers", 100)(step)


def test_results(tmp_path: Path) -> None:
    facts = {
        "benchmark": "mmstar", "status": "scored", "score": 50.0, "rule": "r", "protocol": "p", "full_score": 100.0,
        "model": {"name": "m", "preset": None}, "data": {"path": "gone.tsv", "images": None, "sha256": "d" * 64},
        "generation": {"max_new_tokens": 5}, "versions": {"torch": "2"}, "judge": None,
    }  # fmt: skip
    answers = [{"index": n, "prompt": "?", "prediction": "A", "category": "c", "answer": "A"} for n in range(3)]
    files = {
        "results.json": json.dumps(facts).encode(),
        "per_sample.json": json.dumps({str(n): n == 1 for n in range(3)}).encode(),
        "answers.jsonl": "".join(json.dumps(answer) + "\n" for answer in answers).encode(),
    }

    def step(rng: random.Random) -> None:
        for name, content in files.items():
            (tmp_path / name).write_bytes(damaged(content, rng) if rng.random() < 0.3 else content)
        if rng.random() < 0.5:
            changed = {**facts, rng.choice(list(facts)): rng.choice(HOSTILE)}
            part = rng.choice(("model", "data"))
            if isinstance(changed[part], dict):
                changed[part] = {**changed[part], rng.choice(list(changed[part]) or ["name"]): rng.choice(HOSTILE)}
            (tmp_path / "results.json").write_text(json.dumps(changed))
        result = Result.load(tmp_path)
        overview = Overview([result])
        overview.cells(), overview.facts(), overview.values(percent), by_category([result])
        collect_questions(get_benchmark(result.benchmark), [result], tmp_path)

    tries("results", 80)(step)


def test_replies_of_a_judge(tmp_path: Path) -> None:
    whole = json.dumps(
        {"choices": [{"index": 0, "message": {"role": "assistant", "content": "0.5 \U0001f600"}}]}
    ).encode()

    def step(rng: random.Random) -> None:
        reply: Any = damaged(whole, rng)
        if rng.random() < 0.3:
            reply = json.dumps({"choices": [{"message": {"content": rng.choice(HOSTILE)}}]}).encode()
        try:
            _content(reply).encode()
        except _TryAgain:
            pass
        parse_retry_after(str(rng.choice(HOSTILE)))
        (tmp_path / "g.json").write_text(
            json.dumps({"v1_0": {"asked": rng.choice(HOSTILE), "score": rng.choice(HOSTILE)}})
        )
        read_replies(tmp_path / "g.json", {"v1_0": "?"}, score=list)

    tries("judge", 150)(step)
