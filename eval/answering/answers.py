"""Answers on disk: written as they come, continued after a kill, never mixed with the answers of another run."""

import fcntl
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from llava_skip_base.errors import UserError, first_few
from llava_skip_base.files import json_lines, parse_json, read_json, write_json, write_json_lines, writing
from llava_skip_base.texts import shortened


class AnswerLog:
    """A JSON-lines file with one answer a line, and next to it `run.json`, which says to which run they belong.

    Attributes:
        answers: the answers on disk, by id.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Open the log of a folder, or start it.

        Args:
            folder: its folder.
            identity: everything that the answers depend on.

        Raises:
            UserError: the folder holds another run's answers or a damaged file, or another process writes to it.
        """
        self.path = folder / "answers.jsonl"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)  # nothing is left to write when a full disk ends the run
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another run is writing there; wait, or choose another --output.") from error
        self.answers: dict[Any, dict[str, Any]] = {}
        try:
            self._recover()
            self._claim(folder / "run.json", dict(identity))
        except UserError:
            self._file.close()
            raise

    def append(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Add answers, each with its `index`, and hand them to the operating system at once.

        Raises:
            UserError: they cannot be written; all answers before are kept.
        """
        left = memoryview(json_lines(answers).encode())
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise UserError(
                f"{self.path}: an answer cannot be written ({error.strerror}); make room, and run the same command "
                f"again: the {len(self.answers)} answers before it are kept."
            ) from error
        self.answers.update({answer["index"]: dict(answer) for answer in answers})

    def __enter__(self) -> "AnswerLog":
        """Return the open log."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file, which also releases its lock."""
        self._file.close()

    def sort(self, ids: Iterable[Any]) -> None:
        """Sort the lines of the file by `ids`, so that they do not depend on which answer came first.

        Answers to other questions come last.
        """
        answers = {id_: self.answers[id_] for id_ in ids if id_ in self.answers} | self.answers
        if list(answers) != list(self.answers):
            with writing(self.path):
                write_json_lines(self.path, answers.values())
            self.answers = answers

    def _claim(self, path: Path, identity: dict[str, Any]) -> None:
        """Write what the answers depend on, or compare it with what is there."""
        if not self.answers:
            with writing(path):
                write_json(path, identity)
            return
        if not path.exists():
            raise UserError(f"{self.path} has answers, but {path.name} is gone; remove it or choose another --output.")
        saved = read_json(path)
        if not isinstance(saved, dict):
            raise UserError(
                f"{path}: expected a JSON object, saw a {type(saved).__name__}, so it is unknown whose answers are "
                "there; choose another --output, or remove that folder to start over."
            )
        changed = [
            f"{shortened(name)}: {shortened(saved.get(name))} there, {shortened(identity.get(name))} now"
            for name in sorted(saved.keys() | identity.keys())
            if saved.get(name) != identity.get(name)
        ]
        if changed:
            raise UserError(
                f"{path.parent} holds the answers of another run ({'; '.join(changed[:9])}); "
                "choose another --output, or remove that folder to start over."
            )

    def _recover(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            # A kill during a write leaves half a line; its question is asked again.
            self._file.truncate(whole)
        doubled = []
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                answer = parse_json(line.decode())
                index = _index(answer)
            except ValueError as error:
                raise UserError(f"{self.path}, line {number}: not an answer ({error}); remove that line.") from error
            if index in self.answers:
                doubled.append(index)
            self.answers[index] = answer
        if doubled:
            raise UserError(
                f"{self.path}: answers occur twice for {first_few(doubled)}; remove the file to start over."
            )


def _index(answer: Any) -> int | str:
    """The id of a saved answer.

    Raises:
        ValueError: it has none, or holds no text.
    """
    if not isinstance(answer, dict):
        raise ValueError(f"expected a JSON object, saw a {type(answer).__name__}")
    index = answer.get("index")
    if isinstance(index, bool) or not isinstance(index, int | str):
        raise ValueError(f"its index is {shortened(index)}, and no number or text")
    if not isinstance(answer.get("prediction"), str):
        raise ValueError("it has no text as its prediction")
    return index
