"""Findings, kept in the cache so that a set is examined once, and what a run refuses or drops.

The first process examines the set; the others, and later runs on the same set, read its findings and examine again only
the records in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from llava_skip.processing import LlavaSkipProcessor
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json, write_json
from train.data.checks import Examined, Finding, FullCheck, QuickCheck
from train.data.parallel import map_rows
from train.data.reading import cache_file
from train.data.sources import RecordSet

SHOWN = 5
"""Findings that an error shows."""


def findings_path(check: QuickCheck) -> Path:
    """The file of a check's findings in the cache."""
    return cache_file(f"check-{check.key}.json")


def examine(check: QuickCheck, processes: int, title: str) -> Iterator[Examined]:
    """Every record that is read, examined once, in order."""
    return map_rows(check, check.records.used_rows, processes, title)


def save_findings(check: QuickCheck, errors: list[Finding], unread: Counter[str]) -> None:
    """Keep the errors that a check found, and how many records have each column that nothing reads."""
    write_json(findings_path(check), {"errors": [error._asdict() for error in errors], "unread": dict(unread)})


def find_errors(records: RecordSet, processor: LlavaSkipProcessor, max_length: int, processes: int) -> list[Finding]:
    """The errors of a set: from the findings of a full check or a quick one, or by a quick check now."""
    full, quick = (kind(records, processor, max_length) for kind in (FullCheck, QuickCheck))
    for check in (full, quick):
        path = findings_path(check)
        with FileLock(f"{path}.lock"):
            if path.is_file():
                rows = dict.fromkeys(entry["row"] for entry in read_json(path)["errors"])
                return [f for row in rows for f in check(row).findings if f.is_error]
            if check is quick:
                errors, unread = [], Counter[str]()
                for examined in examine(check, processes, "checking records"):
                    errors += examined.findings
                    unread.update(examined.unread)
                save_findings(check, errors, unread)
                return errors
    raise AssertionError("the quick check always answers")


def usable_records(
    records: RecordSet, processor: LlavaSkipProcessor, max_length: int, processes: int, drop_faulty: bool
) -> tuple[RecordSet, list[Finding]]:
    """The records that can be trained on, and the errors of those that were dropped.

    Raises:
        UserError: there are errors, and `drop_faulty` is not set; names the first ones and counts the others.
    """
    errors = find_errors(records, processor, max_length, processes)
    if errors and not drop_faulty:
        more = f"\n... and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
        raise UserError(
            f"{len({error.row for error in errors})} of {len(records.used_rows)} records are faulty:\n"
            + "\n".join(f"{error.record}: {error.text}" for error in errors[:SHOWN])
            + f"{more}\nRepair them, or leave them out with --drop_faulty true; llava-skip validate-data lists all."
        )
    return records.without([error.row for error in errors]), errors


def unread_columns(records: RecordSet, processor: LlavaSkipProcessor, max_length: int) -> dict[str, int]:
    """The columns of a set that nothing reads, the most frequent first, each with the number of records that have it.

    They are in the findings of the set: `find_errors` comes first. A field of a turn has the turns' column in its name.
    """
    paths = [findings_path(kind(records, processor, max_length)) for kind in (FullCheck, QuickCheck)]
    saved = read_json(next(path for path in paths if path.is_file()))
    return dict(Counter(saved["unread"]).most_common())


def dropped_findings(records: RecordSet, errors: list[Finding]) -> dict[str, Any]:
    """What `dropped.json` of a run says about the records that it dropped."""
    counts = dict(Counter(error.kind for error in errors))
    return {"fingerprint": records.fingerprint, "counts": counts, "records": [error._asdict() for error in errors]}
