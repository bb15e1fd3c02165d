"""Reads the body of a chat completion: everything in it is checked before it costs anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from llava_skip.processing import IMAGE_TOKEN
from llava_skip_base.errors import UserError
from llava_skip_base.images import ImageError, data_uri_bytes, is_data_uri
from llava_skip_base.texts import plain, shortened
from serve.answering import AnswerOptions
from serve.conversation import Picture, without_placeholder

MOST_MESSAGES = 1000
"""Messages and parts of them in a request."""
MOST_CHARACTERS = 1_000_000
"""Characters of a request's texts, which take about a second to become tokens; models take far fewer."""
MOST_STOPS = 4
"""Texts of `stop`, as in OpenAI's interface."""
_READ = (
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "seed", "stop",
)  # fmt: skip
_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields that say nothing about the answer."""
_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "n": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "logprobs": (False,), "logit_bias": ({},),
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (False, True),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "store": (False,), "top_logprobs": (0,),
    "service_tier": ("auto", "default"),
}  # fmt: skip
"""Fields that are not supported, and the values with which they change nothing."""
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Role in a request -> role in a chat template."""


@dataclass(frozen=True)
class Limits:
    """What one client may ask for.

    Attributes:
        new_tokens: of an answer.
        images: of a request.
        pixels: of a request's images together, before they are resized.
        body: bytes of a request.
        seconds: of the work on an answer, without the time that it waits for its turn.
        requests: that are answered, wait or are received at a time.
    """

    new_tokens: int = 1024
    images: int = 16
    pixels: int = 100_000_000
    body: int = 32 * 2**20
    seconds: float = 300.0
    requests: int = 32


class RequestError(UserError):
    """A request that is refused.

    Attributes:
        status: of HTTP.
        param: the field that is wrong, if it is one.
        code: a word for programs.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in the form of OpenAI's interface."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    where = None if param is None else plain(param)  # they may quote halves of characters, which no text can have
    return {"error": {"message": plain(message), "type": kind, "param": where, "code": code}}


@dataclass(frozen=True)
class Asked:
    """A conversation whose images are open; `serve.answering` answers it."""

    turns: Sequence[tuple[str, str | list[Any]]]
    pictures: list[Picture] = field(default_factory=list)

    def messages(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them, images as `PIL.Image`."""
        return [
            {"role": role, "content": content if isinstance(content, str) else [_part(part) for part in content]}
            for role, content in self.turns
        ]


def _part(part: str | Picture) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "image": part.pixels}


@dataclass(frozen=True)
class _Image:
    """An image that has not been read: its data URI."""

    uri: str


@dataclass(frozen=True)
class ChatRequest:
    """A chat completion that is asked for; its images have not been read.

    Attributes:
        turns: role and content of each message; a content is a text, or a list of texts and images.
        options: of the answer.
        stream: whether it is sent as it comes.
        seed: of the sampling, if it is asked for.
    """

    turns: Sequence[tuple[str, str | list[Any]]]
    options: AnswerOptions
    stream: bool
    seed: int | None

    def opened(self, processor: Any, limits: Limits, known: Mapping[bytes, Picture]) -> tuple[Asked, Mapping]:
        """The conversation with its images.

        Args:
            processor: whose limits the images must keep.
            limits: of pixels.
            known: images of an earlier request, by the digest of their files: these are not read again.

        Returns:
            The conversation, and its images by their digests.

        Raises:
            RequestError: an image cannot be read, or the images have too many pixels.
        """
        left, found, pictures = limits.pixels, dict[bytes, Picture](), list[Picture]()

        def check(width: int, height: int) -> None:
            nonlocal left
            left -= width * height
            if left < 0:
                most = limits.pixels / 1e6
                raise RequestError(f"the images have more than {most:g} million pixels together", "messages")
            processor.check_image_size(width, height)

        def read(image: _Image) -> Picture:
            number = len(pictures) + 1
            try:
                content = data_uri_bytes(image.uri)
                digest = sha256(content).digest()
                picture = found.get(digest) or known.get(digest)
                if picture is None:
                    picture = Picture.of(f"image {number}", content, check)
                else:
                    check(*picture.pixels.size)
            except ImageError as error:
                raise RequestError(f"image {number} cannot be read: {error}", "messages") from error
            found[digest] = picture
            pictures.append(picture)
            return picture

        turns: list[tuple[str, str | list[Any]]] = []
        for role, content in self.turns:
            if not isinstance(content, str):
                content = [part if isinstance(part, str) else read(part) for part in content]
            turns.append((role, content))
        return Asked(turns, pictures), found


def read_request(body: Mapping[str, Any], name: str, limits: Limits) -> ChatRequest:
    """The chat completion that a body asks for.

    Args:
        body: as JSON has it.
        name: of the one model that is served.
        limits: of a request.

    Raises:
        RequestError: something in it is wrong, too large, or would be ignored.
    """
    given = {key: value for key, value in body.items() if value is not None}
    _check_fields(given)
    model = _typed(given, "model", str, None)
    if model is None:
        raise RequestError(f"model is missing: this server has {name!r}", "model")
    if model != name:
        message = f"there is no model {shortened(model)!r}: this server has {name!r} and loads no other"
        raise RequestError(message, "model", "model_not_found", 404)
    turns = _read_messages(given.get("messages"), limits)
    return ChatRequest(turns, _options(given, limits), _stream(given), _number(given, "seed", -(2**63), 2**63 - 1, int))


def _check_fields(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in _READ or name in _IGNORED:
            continue
        if name not in _NEUTRAL:
            raise RequestError(f"there is no field {shortened(name)!r} here: leave it out", shortened(name))
        if not any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in _NEUTRAL[name]):
            neutral = " or ".join(map(repr, _NEUTRAL[name]))
            raise RequestError(f"{name} is not supported: leave it out, or give {neutral}", name)


def _typed(given: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = given.get(name, default)
    if name in given and not isinstance(value, kind):
        raise RequestError(f"{name} must be of the type {kind.__name__}", name)
    return value


def _number(given: Mapping[str, Any], name: str, least: float, most: float, kind: type = float) -> Any:
    """A number of a field; None without one."""
    value = given.get(name)
    if value is None:
        return None
    kinds = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        word = "an integer" if kind is int else "a number"
        raise RequestError(f"{name} is {shortened(value)}; it must be {word} from {least} to {most}", name)
    return kind(value)


def _options(given: Mapping[str, Any], limits: Limits) -> AnswerOptions:
    lengths = [_number(given, name, 1, limits.new_tokens, int) for name in ("max_completion_tokens", "max_tokens")]
    length = next((length for length in lengths if length is not None), limits.new_tokens)
    stops = given.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(_is_stop(stop) for stop in stops):
        raise RequestError(f"stop must be a text, or up to {MOST_STOPS} of them, none empty", "stop")
    temperature, top_p = _number(given, "temperature", 0, 2), _number(given, "top_p", 0, 1)
    if top_p == 0:
        temperature, top_p = 0.0, None  # the most likely token alone
    return AnswerOptions(length, temperature or 0.0, top_p, tuple(stops))


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200


def _stream(given: Mapping[str, Any]) -> bool:
    options = _typed(given, "stream_options", dict, {})
    if unknown := options.keys() - {"include_usage", "include_obfuscation"}:
        raise RequestError(f"stream_options has no field {shortened(min(unknown))!r} here", "stream_options")
    for name in options:
        _typed(options, name, bool, False)
    return _typed(given, "stream", bool, False)


def _read_messages(messages: Any, limits: Limits) -> list[tuple[str, str | list[Any]]]:
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of messages, and not empty", "messages")
    if len(messages) > MOST_MESSAGES:
        raise RequestError(f"there are {len(messages):,} messages; at most {MOST_MESSAGES:,} are taken", "messages")
    _check_amount(messages, limits)
    turns = [_read_message(message, f"messages[{number}]") for number, message in enumerate(messages)]
    images = sum(isinstance(part, _Image) for _, content in turns if isinstance(content, list) for part in content)
    if images > limits.images:
        raise RequestError(f"there are {images:,} images; at most {limits.images:,} are taken", "messages")
    if turns[-1][0] != "user":
        raise RequestError("the last message must be the user's: it is what is answered", "messages")
    return turns


def _check_amount(messages: list[Any], limits: Limits) -> None:
    """Raise RequestError if there is more than may be read; nothing else looks at the texts before."""
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    characters = sum(len(text) for text in texts if isinstance(text, str))
    if len(parts) > MOST_MESSAGES + limits.images or characters > MOST_CHARACTERS:
        raise RequestError(
            f"the messages have {len(parts):,} parts with {characters:,} characters; at most {MOST_MESSAGES:,} and "
            f"{MOST_CHARACTERS:,} are taken",
            "messages",
        )


def _read_message(message: Any, where: str) -> tuple[str, str | list[Any]]:
    if not isinstance(message, dict):
        raise RequestError(f"{where} must be an object with role and content", where)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise RequestError(f"{where}.role is {shortened(role)!r}; choose one of {', '.join(_ROLES)}", f"{where}.role")
    for name, value in message.items():
        if name not in ("role", "content", "name") and value not in (None, []):
            raise RequestError(f"{where} has {shortened(name)!r}, which is not supported", where)
    content, role = message.get("content"), _ROLES[role]
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, str):
        return role, _read_text(content, role, where)
    if not isinstance(content, list) or not content:
        raise RequestError(f"{where}.content must be a text or a list of parts", f"{where}.content")
    parts = [_read_part(part, role, f"{where}.content[{number}]") for number, part in enumerate(content)]
    if all(isinstance(part, str) for part in parts):
        return role, "".join(parts)
    return role, parts


def _read_part(part: Any, role: str, where: str) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return _read_text(part.get("text"), role, where)
    if kind != "image_url":
        raise RequestError(f"{where} must be an object of the type text or image_url", where)
    if role != "user":
        raise RequestError(f"{where} is an image; only the user's messages may have one", where)
    image = part.get("image_url")
    uri = image.get("url") if isinstance(image, dict) else image
    if not isinstance(uri, str):
        raise RequestError(f"{where} has no image_url.url", where)
    if not is_data_uri(uri):
        raise RequestError(
            f"{where} is no data URI (data:image/png;base64,...): this server opens no addresses and no files", where
        )
    return _Image(uri)


def _read_text(text: Any, role: str, where: str) -> str:
    if not isinstance(text, str):
        raise RequestError(f"{where} has no text", where)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # halves of characters
        raise RequestError(f"{where} has characters that are no text", where) from error
    if role == "assistant":  # the model may have written the placeholder
        return without_placeholder(text)
    if IMAGE_TOKEN in text:
        raise RequestError(f"{where} has {IMAGE_TOKEN}, which stands for an image: give images as parts", where)
    return text
