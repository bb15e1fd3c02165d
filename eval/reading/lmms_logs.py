"""Read the sample logs of lmms-eval (`..._samples_TASK.jsonl`), whose rows hold answers and what its metrics used.

Logs of lmms-eval up to 0.2 hold the question as `doc`. Later ones hold only what the metrics of the task repeat of it,
so most need the benchmark file; `doc_id` is the number of the question in that file.
"""

import re
from collections.abc import Sequence
from typing import Any

from eval.reading.tables import Row, cell_text, column_name
from eval.sample import Id, Sample
from llava_skip_base.errors import UserError

# The server's form of an answer, whose "answer" is the model's, and images.
_NOT_FIELDS = ("submission", "input_media")
_IDS = ("index", "question_id", "id")
_NAMES = {"ground_truth": "answer", "gt_answer": "answer", "capabilities": "capability"}
_PLACEHOLDER = re.compile(r"<image ?\d*>")


def plain_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of a sample log as plain rows with the answer as `prediction`; rows of other files stay as they are."""
    return [_plain(row) if "doc_id" in row and "filtered_resps" in row else row for row in rows]


def answers_by_number(rows: Sequence[Row], samples: Sequence[Sample]) -> dict[Id, str] | None:
    """The answers of a log, paired with questions by number; None for other files, or where the log's ids must do it.

    Args:
        rows: rows of `plain_rows`.
        samples: the questions of the benchmark file, in its order.

    Raises:
        UserError: the questions with these numbers are other ones, and the log has no ids.
    """
    if not all({"doc_id", "question", "prediction"} <= row.keys() for row in rows):
        return None
    numbers = [int(row["doc_id"]) if _is_number(row["doc_id"]) else len(samples) for row in rows]
    if len(set(numbers)) == len(rows) and max(numbers) < len(samples):
        found = [samples[number] for number in numbers]
        pairs = [(s.fields.get("question", ""), row["question"]) for s, row in zip(found, rows, strict=True)]
        if all(_words(own) in _words(asked) for own, asked in pairs):
            return {sample.id: row["prediction"] for sample, row in zip(found, rows, strict=True)}
    if not any(name in rows[0] for name in _IDS):
        raise UserError(
            f"the log's {len(rows)} questions are not the ones that the benchmark file, of {len(samples)}, has at its "
            "numbers (doc_id); give the file that lmms-eval read, in its order."
        )
    return None


def _plain(row: Row) -> Row:
    prompt = row.get("input") or next(iter(row.get("arguments") or [""]))
    prompt = prompt if isinstance(prompt, str) else str(prompt)
    fields: Row = {}
    for part in (row.get("doc"), *(cell for name, cell in row.items() if name not in ("doc", *_NOT_FIELDS))):
        for name, cell in part.items() if isinstance(part, dict) else ():
            fields.setdefault(_NAMES.get(column_name(name), column_name(name)), cell_text(cell))
    return {"question": prompt, **fields, "doc_id": row["doc_id"], "prediction": _first(row["filtered_resps"])}


def _first(reply: Any) -> str:
    while isinstance(reply, list):
        reply = reply[0] if reply else ""
    return str(reply)


def _is_number(text: Any) -> bool:
    return isinstance(text, str) and text.isdecimal() and len(text) < 10


def _words(text: Any) -> str:
    return " ".join(_PLACEHOLDER.sub(" ", str(text)).lower().split())
