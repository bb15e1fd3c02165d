"""The one form of a record, whatever file it comes from, and what can be wrong with it before an image is opened.

A record is `{"id", "messages", "images", "fault", "unread"}`: messages are `{"role", "content"}` turns in
transformers' roles with `<image>` where an image belongs, and `"supervised": False` in an answer without labels;
images are file names, data URIs or `{"bytes", "path"}`; fault says why a row could not be brought into this form;
unread names the columns that hold something and that nothing reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llava_skip.processing import IMAGE_TOKEN, image_first
from llava_skip_base.errors import shortened
from train.data.turns import ROLES, RecordError, Turn, forms_of, read_image, read_turn, short, text_of

Record = dict[str, Any]

COLUMNS = ("id", "messages", "images", "fault", "unread")
OTHER_MEDIA = ("video", "videos", "audio", "audios")
"""Columns whose content would change what a record means."""
MOST_UNREAD = 50
"""Names of unread columns that are kept of one record."""
LONGEST_NAME = 60


class Fault(NamedTuple):
    """What is wrong with a record: a kind, for counting, and a sentence."""

    kind: str
    text: str


def as_record(row: dict[str, Any]) -> Record:
    """A row of a table as a record; tables made of JSON hold records."""
    if row.keys() != set(COLUMNS):
        return normalise(row)
    for message in row["messages"]:
        if message["supervised"] is None:  # Arrow has every field in every turn
            del message["supervised"]
    return row


def normalise(row: Any) -> Record:
    """A row of any of the formats as a record; `fault` says what does not fit."""
    name = row.get("id") if isinstance(row, dict) else None
    name = None if name is None else shortened(str(name).encode("utf-8", "backslashreplace").decode(), LONGEST_NAME)
    try:
        if not isinstance(row, dict):
            raise RecordError(f"a row must be an object, not {short(row)}")
        return {"id": name, **_content(row), "fault": None}
    except RecordError as error:
        return broken(name, str(error))


def broken(name: str | None, fault: str) -> Record:
    """The record of a row that cannot be read."""
    return {"id": name, "messages": [], "images": [], "fault": fault, "unread": []}


def _content(row: dict[str, Any]) -> dict[str, Any]:
    """`messages`, `images` and `unread` of a row."""
    for name in OTHER_MEDIA:
        if row.get(name):
            raise RecordError(f"{name!r} cannot be trained on: a record may have text and images")
    column = "messages" if row.get("messages") is not None else "conversations"
    turns = _turns(row, column)
    messages = [turn.message for turn in turns]
    if column == "conversations":
        for message in messages:
            message["content"] = image_first(message["content"])
    gallery = "images" if row.get("images") is not None else "image"
    images = _all_images(_images(row.get(gallery)), [image for turn in turns for image in turn.images])
    read = ("id", column, gallery, "system", *OTHER_MEDIA)
    unread = [name for name, value in row.items() if name not in read and value is not None]
    unread += [f"{column}[].{name}" for turn in turns for name in turn.unread]
    return {"messages": _with_system(row, messages), "images": images, "unread": _names(unread)}


def _turns(row: dict[str, Any], column: str) -> list[Turn]:
    turns = row.get(column)
    if not isinstance(turns, list) or not all(forms := [forms_of(turn) for turn in turns]):
        keys = "'from' and 'value', or 'role' and 'content'"
        raise RecordError(f"'{column}' must be a list of turns with {keys}")
    return [read_turn(turn, known) for turn, known in zip(turns, forms, strict=True)]


def _with_system(row: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns with the record's own system text in front; an empty one is none."""
    given = row.get("system")
    system = "" if given is None else text_of(given, "'system'")
    own = [message["content"] for message in messages if message["role"] == "system"]
    if not system.strip() or own == [system]:
        return messages
    if own:
        raise RecordError("'system' and a turn of the role system hold different texts: leave one out")
    return [{"role": "system", "content": system}, *messages]


def _images(given: Any) -> list[Any]:
    if given is None:
        return []
    return [read_image(image) for image in (given if isinstance(given, (list, tuple)) else [given])]


def _all_images(images: list[Any], parts: list[Any]) -> list[Any]:
    """The images of a record in the order of their parts, which may name them themselves."""
    named = [image for image in parts if image is not None]
    if not named or named == images:
        return images
    if images or len(named) < len(parts):
        raise RecordError("images must be named either all in the parts of the turns or all in a column of the record")
    return named


def _names(columns: list[str]) -> list[str]:
    """Names of columns that can be stored, each once."""
    unique = list(dict.fromkeys(str(name).encode("utf-8", "backslashreplace").decode() for name in columns))
    return [shortened(name, LONGEST_NAME) for name in unique[:MOST_UNREAD]]


def find_fault(record: Record, image_length: int, max_length: int) -> Fault | None:
    """What is wrong with a record's structure; None if nothing is.

    Args:
        record: in the form above.
        image_length: the most tokens that an image takes.
        max_length: the most tokens of a sample.
    """
    if record["fault"]:
        return Fault("broken row", record["fault"])
    messages = record["messages"]
    roles = [message["role"] for message in messages]
    if unknown := sorted(set(roles) - set(ROLES.values())):
        names = shortened(unknown, 200)
        return Fault("unknown speaker", f"unknown speakers {names}; known: {sorted({*ROLES, *ROLES.values()})}")
    spoken = [role for role in roles if role != "system"]
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        return Fault(
            "turns out of order",
            f"turns must alternate human, gpt, ... and end with gpt; got {shortened(roles, 200)}",
        )
    answers = [message for message in messages if message["role"] == "assistant"]
    if any(IMAGE_TOKEN in answer["content"] for answer in answers):
        return Fault("placeholders", f"an answer has {IMAGE_TOKEN}, but images can only be in a question")
    if not any(answer.get("supervised", True) for answer in answers):
        return Fault("nothing learnt", "every answer is marked as not supervised")
    return _find_image_fault(record, image_length, max_length)


def _find_image_fault(record: Record, image_length: int, max_length: int) -> Fault | None:
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
