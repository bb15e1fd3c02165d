"""A turn of a conversation, in any of the forms in which data sets have it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from llava_skip.processing import IMAGE_TOKEN
from llava_skip_base.errors import UserError, shortened
from llava_skip_base.images import is_data_uri

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "bot": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip
"""Speakers of the formats -> roles of transformers'."""
MARKS = ("weight", "loss", "train")
"""Fields of a turn, each of which says whether it is supervised."""
_FORMS = (("from", "value"), ("role", "content"))
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")
_IMAGE_FIELDS = ("image_url", "image", "url", "path", "base64")
_OTHER_MEDIA = re.compile(r"<(video|audio)>(?!.*</\1>)", re.DOTALL)
"""A marker of another medium; in a web page such a tag is closed."""
_NAMED = re.compile(r"<(?:video|audio)>(?= (?:tag|element|attribute)s?\b)|`<(?:video|audio)>`")
"""The name of a tag, in a text about web pages."""
_IN_A_SENTENCE = re.compile(r"(?<=[^\s<>] )<(?:video|audio)>(?= [^\s<>])")
"""In an answer the name of a tag, as in: use the <video> tag."""
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class RecordError(UserError):
    """A record that cannot be trained on."""

    def __str__(self) -> str:
        """The message; a loader's worker raises the error again with its traceback before the message."""
        return super().__str__().rstrip().rpartition(f"{type(self).__name__}: ")[2]


class Turn(NamedTuple):
    """A turn in the one form.

    Attributes:
        message: `role`, `content`, and `supervised` if it is an answer that is not supervised.
        images: of its image parts, each as in a record, or None if the part does not name it.
        unread: fields that nothing reads.
    """

    message: dict[str, Any]
    images: list[Any]
    unread: list[str]


def read_turn(turn: dict[str, Any], forms: Sequence[tuple[str, str]]) -> Turn:
    """A turn in the one form.

    Raises:
        RecordError: it cannot be brought into it; the message says why.
    """
    speaker, said = next((form for form in forms if turn.get(form[0]) is not None), forms[0])
    role, content, images = _role(turn[speaker]), turn[said], list[Any]()
    if isinstance(content, list) and said == "content":
        parts = [_read_part(part) for part in content]
        content, images = "".join(text for text, _ in parts), [image for _, own in parts for image in own]
    message: dict[str, Any] = {"role": role, "content": _check_markers(text_of(content), role)}
    if not _is_supervised(turn, role):
        message["supervised"] = False
    known = (speaker, said, *MARKS)
    return Turn(message, images, [name for name, value in turn.items() if name not in known and value is not None])


def forms_of(turn: Any) -> list[tuple[str, str]]:
    """The pairs of fields that can be the speaker and the text of a turn."""
    return [form for form in _FORMS if set(form) <= set(turn)] if isinstance(turn, dict) else []


def read_image(image: Any) -> Any:
    """An image as records have it: a file name, a data URI, or bytes with a path.

    Raises:
        RecordError: it is none of them, or an address of the web.
    """
    if isinstance(image, dict):
        if isinstance(image.get("bytes"), bytes) and image["bytes"]:
            return image
        name = image.get("path") or image.get("url")
    else:
        name = image
    if not name or not isinstance(name, str):
        raise RecordError(f"an image must be a file name, or have bytes or a path; got {short(image)}")
    text_of(name, "an image's name")
    if name.startswith("file://"):
        return name.removeprefix("file://")
    if _ADDRESS.match(name):
        raise RecordError(f"the image {short(name)} is an address: download it, and name the file")
    return name


def text_of(value: Any, what: str = "a turn's text") -> str:
    """A value that must be text which can be stored.

    Raises:
        RecordError: it is something else, or has half of a character.
    """
    if not isinstance(value, str):
        raise RecordError(f"{what} must be a string, not {short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RecordError(f"{what} has half of a surrogate pair, which is no character: {short(value)}") from None
    return value


def short(value: Any) -> str:
    """A value of a record for a message."""
    text = json.dumps(value[:60] if isinstance(value, str) else value, default=str)
    return text if len(text) <= 40 else f"{text[:40]}..."


_IMAGE = f"{IMAGE_TOKEN}\n"


def _read_part(part: Any) -> tuple[str, list[Any]]:
    """The text of a part; and of an image part the image, or None if it does not name it."""
    if not isinstance(part, dict):
        raise RecordError(f"a part of a turn must be an object with 'type', not {short(part)}")
    kind = part.get("type")
    if kind is None or kind in _TEXT_PARTS:
        return text_of(part.get("text")), []
    if kind not in _IMAGE_PARTS:
        raise RecordError(f"a part of the type {short(kind)} cannot be trained on, only text and images")
    name = next((name for name in _IMAGE_FIELDS if part.get(name) is not None), None)
    if name == "base64" and isinstance(part[name], str) and not is_data_uri(part[name]):
        return _IMAGE, [f"data:;base64,{part[name]}"]
    return _IMAGE, [None if name is None else read_image(part[name])]


def _role(speaker: Any) -> str:
    name = text_of(speaker, "a turn's speaker")
    return ROLES.get(name, shortened(name, 40))


def _check_markers(text: str, role: str) -> str:
    named = _NAMED.sub("", text)
    if found := _OTHER_MEDIA.search(_IN_A_SENTENCE.sub("", named) if role == "assistant" else named):
        raise RecordError(f"{found[0]} cannot be trained on: a record may have text and images")
    return text


def _is_supervised(turn: dict[str, Any], role: str) -> bool:
    """Whether a turn's own fields leave it supervised, as far as turns of its role are."""
    answers = True
    for name in MARKS:
        value = turn.get(name)
        if value is None:
            continue
        if value not in (0, 1):
            raise RecordError(f"a turn's '{name}' must be 0 or 1, or true or false, not {short(value)}")
        if role != "assistant" and value and name != "weight":
            raise RecordError(f"a turn of the role {short(role)} has '{name}': true, but only answers are supervised")
        answers = answers and bool(value)
    return answers or role != "assistant"
