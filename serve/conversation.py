"""A conversation about images, as a chat template takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from llava_skip.processing import IMAGE_TOKEN
from llava_skip.vision.rgb import to_rgb
from llava_skip_base.errors import UserError
from llava_skip_base.images import ImageError, open_image
from llava_skip_base.texts import shortened


@dataclass(frozen=True, eq=False)
class Picture:
    """An image of a conversation: its file's bytes, which the file may lose, and its pixels; no two are equal."""

    name: str
    content: bytes = field(repr=False)
    pixels: Image.Image = field(repr=False)

    @classmethod
    def read(cls, path: Path, *processors: Any, shown: str | None = None) -> Picture:
        """The image of a file, for one or more processors; messages call it `shown`, by default its path.

        Raises:
            UserError: it cannot be read, is no image, or would become too large for a processor.
        """
        name = shortened(path if shown is None else shown, 300)
        try:
            if path.exists() and not path.is_file():  # a device would be read without an end
                raise UserError(f"{name} is no file: give the path of an image.")
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error.strerror}): give the path of an image.") from error

        def check(width: int, height: int) -> None:
            for processor in processors:
                processor.check_image_size(width, height)

        try:
            return cls.of(path.name, content, check)
        except ImageError as error:
            raise UserError(f"{name} is no image that can be read ({error}): give another one.") from error

    @classmethod
    def of(cls, name: str, content: bytes, check: Callable[[int, int], None]) -> Picture:
        """The image of a file's bytes.

        Args:
            name: of the file.
            content: its bytes.
            check: called with width and height before the pixels are read; may raise an error.

        Raises:
            ImageError: it is no image that can be read.
        """
        with open_image(content) as opened:
            check(*opened.size)
            return cls(name, content, to_rgb(opened))


class HasMessages(Protocol):
    """What can be answered: messages as transformers' chat templates take them, and their images in their order."""

    @property
    def pictures(self) -> list[Picture]:
        """The images."""

    def messages(self) -> list[dict[str, Any]]:
        """The messages."""


@dataclass
class Turn:
    """A question with its images, and the answer; None until there is one."""

    question: str
    pictures: list[Picture]
    answer: str | None = None


class Conversation:
    """The turns so far, and the images that wait for the next question."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.waiting: list[Picture] = []

    @property
    def pictures(self) -> list[Picture]:
        """The images of all turns, in their order."""
        return [picture for turn in self.turns for picture in turn.pictures]

    def ask(self, question: str) -> Turn:
        """Begin a turn with the images that wait.

        Raises:
            UserError: the question has the placeholder of an image.
        """
        check_question(question)
        turn = Turn(question, self.waiting)
        self.turns.append(turn)
        self.waiting = []
        return turn

    def take_back(self) -> None:
        """Leave out the last turn, whose images wait again."""
        self.waiting = self.turns.pop().pictures + self.waiting

    def clear(self) -> None:
        """Forget everything."""
        self.turns, self.waiting = [], []

    def messages(self) -> list[dict[str, Any]]:
        """The turns as transformers' chat templates take them, images as `PIL.Image`."""
        found: list[dict[str, Any]] = []
        for turn in self.turns:
            images = [{"type": "image", "image": picture.pixels} for picture in turn.pictures]
            text = {"type": "text", "text": turn.question}
            found.append({"role": "user", "content": [*images, text] if images else turn.question})
            if turn.answer is not None:  # a placeholder in it would stand for an image
                found.append({"role": "assistant", "content": without_placeholder(turn.answer)})
        return found


def check_question(question: str) -> None:
    """Raise UserError if a question has the placeholder of an image, or characters that are no text."""
    if IMAGE_TOKEN in question:
        raise UserError(f"{IMAGE_TOKEN} stands for an image: leave it out, and attach the image.")
    try:
        question.encode()
    except UnicodeEncodeError as error:  # halves of characters
        raise UserError("the question has characters that are no text: type it again.") from error


def without_placeholder(answer: str) -> str:
    """An answer without the placeholder of an image, which the model may have written, also around another one.

    In one pass: a text of nested placeholders would be searched again for each of them.
    """
    if IMAGE_TOKEN not in answer:
        return answer
    kept: list[str] = []
    for character in answer:
        kept.append(character)
        if character == IMAGE_TOKEN[-1] and "".join(kept[-len(IMAGE_TOKEN) :]) == IMAGE_TOKEN:
            del kept[-len(IMAGE_TOKEN) :]
    return "".join(kept)
