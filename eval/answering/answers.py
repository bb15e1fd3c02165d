"""Answers on disk: written as they come, taken up again after a kill, never mixed with those of another run."""

import fcntl
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from eval.errors import EvalError, first_few
from eval.showing.score_table import json_lines, write_json, write_lines


class AnswerLog:
    """A JSON-lines file with one answer a line, and beside it ``run.json`` saying which run the answers are of.

    Attributes:
        records: the answers on disk, by id.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Open the log of a folder, or start it.

        Args:
            folder: where the answers lie.
            identity: everything that the answers depend on.

        Raises:
            EvalError: if the folder holds another run's answers, a damaged file, or is being written to.
        """
        self.path = folder / "answers.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EvalError(f"{folder}: another run is writing there; wait, or choose another --output.") from error
        self.records: dict[Any, dict[str, Any]] = {}
        try:
            self._recover()
            self._claim(folder / "run.json", dict(identity))
        except EvalError:
            self._file.close()
            raise

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add answers and hand them to the operating system at once.

        Args:
            records: answers, each with its ``index``.
        """
        self._file.write(json_lines(records))
        self._file.flush()
        self.records.update({record["index"]: dict(record) for record in records})

    def __enter__(self) -> "AnswerLog":
        """Return the open log."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file, which also gives up the claim to be its only writer."""
        self._file.close()

    def sort(self, ids: Iterable[Any]) -> None:
        """Bring the lines of the file into an order that does not depend on which answer came first.

        Args:
            ids: the order; answers to other questions come behind.
        """
        records = {id_: self.records[id_] for id_ in ids if id_ in self.records} | self.records
        if list(records) != list(self.records):
            write_lines(self.path, records.values())
            self.records = {id_: self.records[id_] for id_ in records}

    def _claim(self, path: Path, identity: dict[str, Any]) -> None:
        if not self.records:
            write_json(path, identity)
            return
        if not path.exists():
            raise EvalError(f"{self.path} has answers, but {path.name} is gone; remove it or choose another --output.")
        saved = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{name}: {saved.get(name)} there, {identity.get(name)} now"
            for name in sorted(saved.keys() | identity.keys())
            if saved.get(name) != identity.get(name)
        ]
        if changed:
            raise EvalError(
                f"{path.parent} holds the answers of another run ({'; '.join(changed)}); "
                "choose another --output, or remove that folder to start over."
            )

    def _recover(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            # A kill in the middle of a write leaves half a line; its question is asked again.
            self._file.truncate(whole)
        doubled = []
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                index = record["index"]
            except (ValueError, KeyError, TypeError) as error:
                raise EvalError(f"{self.path}, line {number}: not an answer ({error}); remove that line.") from error
            if index in self.records:
                doubled.append(index)
            self.records[index] = record
        if doubled:
            raise EvalError(
                f"{self.path}: answers occur twice for {first_few(doubled)}; remove the file to start over."
            )
