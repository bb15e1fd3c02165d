"""The one form of a record, whatever file it comes from, and what can be wrong with it before a picture is opened.

A record is `{"id", "messages", "images", "fault"}`: messages are `{"role", "content"}` turns in transformers' roles
with `<image>` where a picture belongs, images are file names or `{"bytes", "path"}`, and fault says why a row could
not be brought into this form.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from llava_skip.errors import UserError
from llava_skip.processing import IMAGE_TOKEN

Record = dict[str, Any]

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
"""Speakers of LLaVA's format -> roles of transformers'."""


class Fault(NamedTuple):
    """What is wrong with a record: a kind, for counting, and a sentence."""

    kind: str
    text: str


def normalise(row: Any) -> Record:
    """A row of any of the formats as a record; what does not fit is said in `fault`, nothing is raised."""
    try:
        return _normalised(row)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        name = str(row["id"]) if isinstance(row, dict) and row.get("id") is not None else None
        return {"id": name, "messages": [], "images": [], "fault": str(error)}


def _normalised(row: Any) -> Record:
    if not isinstance(row, dict):
        raise UserError(f"a row must be an object, not {_short(row)}")
    if row.get("messages") is not None:
        messages = [_from_message(message) for message in _list_of_objects(row, "messages", ("role", "content"))]
    else:
        turns = _list_of_objects(row, "conversations", ("from", "value"))
        messages = [{"role": _role(turn["from"]), "content": _image_first(_text(turn["value"]))} for turn in turns]
    name = None if row.get("id") is None else str(row["id"])
    return {"id": name, "messages": messages, "images": _images(row), "fault": None}


def _list_of_objects(row: dict[str, Any], name: str, keys: tuple[str, str]) -> list[dict[str, Any]]:
    turns = row.get(name)
    if not isinstance(turns, list) or not all(isinstance(t, dict) and set(keys) <= set(t) for t in turns):
        raise UserError(f"'{name}' must be a list of turns with '{keys[0]}' and '{keys[1]}'")
    return turns


def _from_message(message: dict[str, Any]) -> dict[str, str]:
    content = message["content"]
    if isinstance(content, list):  # parts: text, and places of pictures
        content = "".join(f"{IMAGE_TOKEN}\n" if p.get("type") == "image" else _text(p.get("text")) for p in content)
    return {"role": _text(message["role"]), "content": _text(content)}


def _role(speaker: Any) -> str:
    return ROLES.get(speaker, speaker) if isinstance(speaker, str) else _short(speaker)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"a turn's text must be a string, not {_short(value)}")
    return value


def _images(row: dict[str, Any]) -> list[Any]:
    images = row["images"] if row.get("images") is not None else row.get("image")
    if images is None:
        return []
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    for image in images:
        named = isinstance(image, str) and image
        if not named and not (isinstance(image, dict) and (image.get("bytes") or image.get("path"))):
            raise UserError(f"an image must be a file name, or have bytes or a path; got {_short(image)}")
    return images


def _image_first(text: str) -> str:
    """A turn's only picture is moved to its front, as LLaVA does."""
    if text.count(IMAGE_TOKEN) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:40]}..."


def find_fault(record: Record, image_seq_length: int, max_length: int) -> Fault | None:
    """What is wrong with a record's structure; None if nothing is.

    Args:
        record: in the form above.
        image_seq_length: the most rows that a picture takes.
        max_length: rows of a sample.
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
        return Fault("placeholders", f"an answer holds {IMAGE_TOKEN}, but pictures can only be shown, not answered")
    pictures = len(record["images"])
    placeholders = sum(message["content"].count(IMAGE_TOKEN) for message in record["messages"])
    if placeholders != pictures:
        return Fault(
            "placeholders",
            f"{pictures} pictures, but {placeholders} {IMAGE_TOKEN} in the text: the numbers must be the same",
        )
    if pictures * image_seq_length >= max_length:
        return Fault(
            "too many pictures",
            f"{pictures} pictures take {pictures * image_seq_length} rows, --max_length is {max_length}",
        )
    return None
