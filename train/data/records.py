"""The one form of a record, whatever file it comes from, and what can be wrong with it before an image is opened.

A record is `{"id", "messages", "images", "fault"}`: messages are `{"role", "content"}` turns in transformers' roles
with `<image>` where an image belongs, images are file names or `{"bytes", "path"}`, and fault says why a row could
not be brought into this form.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from llava_skip.processing import IMAGE_TOKEN
from llava_skip_base.errors import UserError

Record = dict[str, Any]

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
"""Speakers of LLaVA's format -> roles of transformers'."""


class RecordError(UserError):
    """A record that cannot be trained on."""

    def __str__(self) -> str:
        """The message; a loader's worker raises the error again with its traceback before the message."""
        return super().__str__().rstrip().rpartition(f"{type(self).__name__}: ")[2]


class Fault(NamedTuple):
    """What is wrong with a record: a kind, for counting, and a sentence."""

    kind: str
    text: str


def normalise(row: Any) -> Record:
    """A row of any of the formats as a record; `fault` says what does not fit."""
    name = row.get("id") if isinstance(row, dict) else None
    name = None if name is None else str(name).encode("utf-8", "backslashreplace").decode()
    try:
        return {"id": name, "messages": _messages(row), "images": _images(row), "fault": None}
    except RecordError as error:
        return {"id": name, "messages": [], "images": [], "fault": str(error)}


def _messages(row: Any) -> list[dict[str, str]]:
    if not isinstance(row, dict):
        raise RecordError(f"a row must be an object, not {_short(row)}")
    if row.get("messages") is not None:
        return [_from_message(message) for message in _list_of_objects(row, "messages", ("role", "content"))]
    turns = _list_of_objects(row, "conversations", ("from", "value"))
    return [{"role": _role(turn["from"]), "content": _image_first(_text(turn["value"]))} for turn in turns]


def _list_of_objects(row: dict[str, Any], name: str, keys: tuple[str, str]) -> list[dict[str, Any]]:
    turns = row.get(name)
    if not isinstance(turns, list) or not all(isinstance(t, dict) and set(keys) <= set(t) for t in turns):
        raise RecordError(f"'{name}' must be a list of turns with '{keys[0]}' and '{keys[1]}'")
    return turns


def _from_message(message: dict[str, Any]) -> dict[str, str]:
    content = message["content"]
    if isinstance(content, list):
        content = "".join(map(_part, content))
    return {"role": _text(message["role"]), "content": _text(content)}


def _part(part: Any) -> str:
    if not isinstance(part, dict):
        raise RecordError(f"a part of a turn must be an object with 'type', not {_short(part)}")
    return f"{IMAGE_TOKEN}\n" if part.get("type") == "image" else _text(part.get("text"))


def _role(speaker: Any) -> str:
    return ROLES.get(speaker, _text(speaker)) if isinstance(speaker, str) else _short(speaker)


def _text(value: Any, what: str = "a turn's text") -> str:
    if not isinstance(value, str):
        raise RecordError(f"{what} must be a string, not {_short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RecordError(f"{what} has half of a surrogate pair, which is no character: {_short(value)}") from None
    return value


def _images(row: dict[str, Any]) -> list[Any]:
    images = row["images"] if row.get("images") is not None else row.get("image")
    if images is None:
        return []
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    for image in images:
        name = image.get("path") if isinstance(image, dict) else image
        if isinstance(image, dict) and isinstance(image.get("bytes"), bytes) and image["bytes"]:
            continue
        if not name or not isinstance(name, str):
            raise RecordError(f"an image must be a file name, or have bytes or a path; got {_short(image)}")
        _text(name, "an image's name")
    return images


def _image_first(text: str) -> str:
    """A turn's only image is moved to its start, as LLaVA does."""
    if text.count(IMAGE_TOKEN) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:40]}..."


def find_fault(record: Record, image_length: int, max_length: int) -> Fault | None:
    """What is wrong with a record's structure; None if nothing is.

    Args:
        record: in the form above.
        image_length: the most tokens that an image takes.
        max_length: the most tokens of a sample.
    """
    if record["fault"]:
        return Fault("broken row", record["fault"])
    roles = [message["role"] for message in record["messages"]]
    if unknown := sorted(set(roles) - set(ROLES.values())):
        return Fault("unknown speaker", f"unknown speakers {unknown}; known: {sorted({*ROLES, *ROLES.values()})}")
    spoken = [role for role in roles if role != "system"]
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        return Fault(
            "turns out of order",
            f"turns must alternate human, gpt, ... and end with gpt; got {roles}",
        )
    if any(IMAGE_TOKEN in message["content"] for message in record["messages"] if message["role"] == "assistant"):
        return Fault("placeholders", f"an answer has {IMAGE_TOKEN}, but images can only be in a question")
    images = len(record["images"])
    placeholders = sum(message["content"].count(IMAGE_TOKEN) for message in record["messages"])
    if placeholders != images:
        return Fault(
            "placeholders",
            f"{images} images, but {placeholders} {IMAGE_TOKEN} in the text: the numbers must be the same",
        )
    if images * image_length >= max_length:
        return Fault(
            "too many pictures",
            f"{images} images take {images * image_length} tokens, --max_length is {max_length}",
        )
    return None
