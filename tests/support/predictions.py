"""Files of predictions."""

import csv
import json
from pathlib import Path
from typing import Any

import openpyxl

Rows = list[dict[str, Any]]


def write_predictions(path: Path, rows: Rows) -> Path:
    """Write rows as a tool would that saves predictions, in the format of the suffix."""
    if path.suffix == ".xlsx":
        book = openpyxl.Workbook()
        book.active.append(list(rows[0]))
        for row in rows:
            book.active.append([value if value != "" else None for value in row.values()])
        book.save(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
    return path
