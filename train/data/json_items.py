"""The items of JSON files, one after the other: each with its line, and what is wrong with it.

Whatever is wrong inside an item is a fault of that item and of no other, and nothing is parsed that is too long or
nested too deep. Items of a `.json` list and lines of a `.jsonl` file are read by one parser.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from llava_skip_base.errors import UserError, shortened
from llava_skip_base.files import is_deep_json, parse_json

LIST, LINES = ".json", ".jsonl"
LONGEST = 64 << 20
"""Bytes of an item. Of a longer one only the beginning is kept in memory: it is faulty."""
_ENDINGS = {".json": LIST, ".jsonl": LINES, ".ndjson": LINES}
_MARK = b"\xef\xbb\xbf"
_OTHER_MARKS = (b"\xff\xfe", b"\xfe\xff")
_PEEK = 1 << 16
_CHUNK = 1 << 20
_SPACE = b" \t\r\n"
_NO_SPACE = re.compile(r"[^ \t\r\n]")
_AFTER_ITEM = re.compile(r"[ \t\r\n]*([,\]])")
_BETWEEN = re.compile(rb'["\[\]{,]')
"""What can begin a part of an item, or end it."""
_UP_TO_MARK = re.compile(rb'[^"\[\]{}]*(?:"[^"\\]*(?:\\.[^"\\]*){0,64}"[^"\[\]{}]*){0,64}', re.DOTALL)
"""Inside brackets: up to the next bracket, past strings; as far as one match goes without much memory."""
_REST_OF_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*){0,256}', re.DOTALL)
_PARSER = json.JSONDecoder()
_ID = re.compile(rb'"id"\s*:\s*("[^"\\]{0,200}"|-?\d{1,40}\b)')


class Item(NamedTuple):
    """An item of a file.

    Attributes:
        line: where it begins, from 1.
        value: what it holds; None if it has a fault.
        fault: why it cannot be read; goes on after its name.
        name: its id as far as it can be found, if it has a fault.
    """

    line: int
    value: Any
    fault: str | None = None
    name: str | None = None


def json_kind(path: Path) -> str | None:
    """Whether a file's name says that it is a JSON list or JSON lines, compressed or not; None: neither."""
    name = path.name.lower().removesuffix(".gz")
    return next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), None)


def json_items(path: Path) -> Iterator[Item]:
    """The items of a JSON list, or the lines of a JSON-lines file.

    Raises:
        UserError: the file is damaged, no UTF-8, or not of the form that its name says.
    """
    with _opened(path) as file:
        yield from (_lines if json_kind(path) == LINES else _list)(path, file)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes after a byte order mark; unpacked if they are those of gzip."""
    with path.open("rb") as plain:
        packed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        file = cast(BinaryIO, gzip.open(plain)) if packed else plain
        try:
            start = file.read(len(_MARK))
            if start.startswith(_OTHER_MARKS):
                raise UserError(f"DATA {path} is not valid JSON: it is UTF-16 text; convert it to UTF-8.")
            file.seek(len(_MARK) if start == _MARK else 0)
            yield file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"DATA {path} cannot be unpacked ({error}): is it cut? Copy it again.") from error


def _parsed(line: int, text: bytes) -> Item:
    """The item that a text holds."""
    try:
        return Item(line, parse_json(text.decode(), halves=True))
    except ValueError as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg} at line {line + error.lineno - 1}, column {error.colno}"
        return Item(line, None, f"is not valid JSON: {reason}", _find_id(text))


def _too_long(line: int, text: bytes) -> Item:
    return Item(line, None, f"is longer than {LONGEST >> 20} MiB", _find_id(text))


def _past_space(text: str, start: int) -> int:
    found = _NO_SPACE.search(text, start)
    return found.start() if found else len(text)


def _find_id(text: bytes) -> str | None:
    found = _ID.search(text)
    return found[1].decode("utf-8", "backslashreplace").strip('"') if found else None


def _lines(path: Path, file: BinaryIO) -> Iterator[Item]:
    number = 0
    while line := file.readline(LONGEST):
        number, rest = number + 1, line
        while len(rest) == LONGEST and not rest.endswith(b"\n"):
            rest = file.readline(LONGEST)
        if number == 1 and line.lstrip().startswith(b"["):
            raise UserError(f"DATA {path} holds a list, not one object a line: name it .json.")
        if line.strip():
            yield (_parsed if rest is line else _too_long)(number, line)


def _list(path: Path, file: BinaryIO) -> Iterator[Item]:
    start = file.read(_PEEK)
    text = start.lstrip(_SPACE)
    if text.startswith(b"["):
        before = len(start) - len(text)
        file.seek(file.tell() - len(text) + 1)
        yield from _ListItems(path, file, 1 + start.count(b"\n", 0, before))
        return
    reason = "must hold a list of conversation objects, with at least one in it"
    if len(start) < _PEEK:
        try:
            parse_json(start.decode())
        except ValueError as error:
            hint = " (one object a line is named .jsonl)" if str(error).startswith("Extra data") else ""
            reason = f"is not valid JSON: {shortened(error, 200)}{hint}"
    raise UserError(f"DATA {path} {reason}.")


class _ListItems:
    """The items of a JSON list, from behind its opening bracket.

    Good items are parsed from a piece of the file. Where the parser stops, the end of the item is looked for by
    brackets and strings alone.

    Attributes:
        buffer: bytes of the file.
        begin: where in them the item begins.
        at: how far they have been looked at.
        head: the beginning of an item that is too long to be kept.
        line: of the beginning of the item.
        passed: lines of the item that are no longer in the buffer.
        open: the brackets that are open in the item.
        counts: how many of each form.
        ended: whether the end of the list has been reached.
    """

    def __init__(self, path: Path, file: BinaryIO, line: int) -> None:
        self.path, self.file, self.line, self.ended = path, file, line, False
        self.buffer, self.begin, self.at, self.head, self.passed = b"", 0, 0, b"", 0
        self.open, self.counts = bytearray(), {b"[": 0, b"{": 0}

    def __iter__(self) -> Iterator[Item]:
        """Each item; see `json_items`."""
        count = 0
        while not self.ended:
            for item in self._parse_piece():
                count += 1
                yield item
            if self.ended:
                break
            found = self._find_end()
            if found or count or not self.ended:  # an empty list has no item
                count += 1
                yield found or Item(self.line, None, "is not valid JSON: there is nothing beside a comma")
        if (self.buffer[self.begin :] + self.file.read(_CHUNK)).strip(_SPACE):
            raise UserError(f"DATA {self.path} is not valid JSON: line {self.line} goes on after the end of the list.")

    def _parse_piece(self) -> Iterator[Item]:
        """Items up to the first that is not whole in the buffer, or has a fault."""
        end = self.buffer.rfind(b"}", self.begin, self.begin + _CHUNK) + 1
        try:
            text = self.buffer[self.begin : end].decode()
        except UnicodeDecodeError:
            return
        done, start = 0, _past_space(text, 0)
        while start < len(text):
            try:
                value, end = _PARSER.raw_decode(text, start)
            except (ValueError, RecursionError):
                break
            after = _AFTER_ITEM.match(text, end)
            if not after or is_deep_json(text[start:end], value):
                break
            self.line += text.count("\n", done, start)
            yield Item(self.line, value)
            self.line += text.count("\n", start, after.end())
            done, self.ended = after.end(), after[1] == "]"
            start = len(text) if self.ended else _past_space(text, done)
        self.begin += len(text[:done].encode())
        self.at = self.begin

    def _find_end(self) -> Item | None:
        """The item at which we are, which may have any fault; None if there is nothing before its end."""
        while True:
            mark = self._next_mark()
            if mark == b'"':
                self._pass_string()
            elif mark in self.counts:
                self.open += mark
                self.counts[mark] += 1
            elif self.open:
                self._close(b"[" if mark == b"]" else b"{")
            else:  # a comma, or the end of the list
                self.ended = mark == b"]"
                return self._cut()

    def _next_mark(self) -> bytes:
        while True:
            if self.open:
                found = _UP_TO_MARK.match(self.buffer, self.at)
                self.at = found.end() if found else self.at
            else:
                found = _BETWEEN.search(self.buffer, self.at)
                self.at = found.start() if found else len(self.buffer)
            if self.at < len(self.buffer):
                self.at += 1
                return self.buffer[self.at - 1 : self.at]
            self._read_more()

    def _pass_string(self) -> None:
        """Go on behind the string that has begun."""
        while True:
            found = _REST_OF_STRING.match(self.buffer, self.at)
            self.at = found.end() if found else self.at
            if self.buffer[self.at : self.at + 1] == b'"':
                self.at += 1
                return
            if len(self.buffer) - self.at < 2:  # a backslash and what it escapes stay together
                self._read_more()

    def _close(self, opener: bytes) -> None:
        """Close the innermost bracket of the same form, and what was left open inside it."""
        if self.counts[opener]:
            place = self.open.rfind(opener)
            for form in self.counts:
                self.counts[form] -= self.open.count(form, place)
            del self.open[place:]

    def _cut(self) -> Item | None:
        """The item that ends before the mark at which we are."""
        text = self.buffer[self.begin : self.at - 1]
        self.begin, head, self.head, passed, self.passed = self.at, self.head, b"", self.passed, 0
        beginning = head or text
        body = beginning.lstrip(_SPACE)
        first = self.line + beginning.count(b"\n", 0, len(beginning) - len(body))
        self.line += passed + text.count(b"\n")
        if not body:
            return None
        return _too_long(first, head) if head else _parsed(first, body)

    def _read_more(self) -> None:
        kept = self.buffer[self.begin :]
        self.at -= self.begin
        if len(kept) > LONGEST:
            self.head = self.head or kept[:_CHUNK]
            self.passed += kept.count(b"\n", 0, self.at)
            kept, self.at = kept[self.at :], 0
        more = self.file.read(max(_CHUNK, min(len(kept), LONGEST)))
        if not more or len(self.open) > LONGEST:
            where = f"the list, or the record in it that begins on line {self.line}, does not end"
            raise UserError(f"DATA {self.path} is not valid JSON: {where}: is the file cut?")
        self.buffer, self.begin = kept + more, 0
