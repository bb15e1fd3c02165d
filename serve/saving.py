"""Writes a conversation as training data: a data set of one record in LLaVA's format, and its images beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llava_skip.processing import IMAGE_TOKEN
from llava_skip_base.errors import UserError
from llava_skip_base.files import write_bytes, write_json, write_json_lines, writing
from llava_skip_base.texts import shortened
from serve.conversation import Conversation, without_placeholder


class Saver:
    """Saves a conversation, again and again, and overwrites nothing but what it wrote of the same conversation."""

    def __init__(self) -> None:
        self._own: set[str] = set()

    def clear(self) -> None:
        """From now on it is another conversation, which has no files yet."""
        self._own = set()

    def save(self, conversation: Conversation, file: Path) -> None:
        """Write the answered turns, and the images into a folder of the file's whole name and `_images`.

        Raises:
            UserError: nothing was answered yet, somebody else's file or folder is there, or they cannot be written.
        """
        turns = [turn for turn in conversation.turns if turn.answer is not None]
        if not turns:
            raise UserError("there is no answer to save yet: ask first.")
        if str(file).startswith("~"):
            raise UserError(f"{shortened(file, 300)}: there is no such user; give another path.")
        place = Path(os.path.abspath(file))
        folder = place.parent / f"{place.name}_images"
        contents = [(picture.name, picture.content) for turn in turns for picture in turn.pictures]
        names = [_name(folder, number, name) for number, (name, _) in enumerate(contents, start=1)]
        with writing(file):
            for path in (place, *([folder] if names else [])):
                if os.path.lexists(path) and str(path) not in self._own:
                    raise UserError(f"{shortened(path, 300)} exists: give another name.")
            self._own |= {str(place), *([str(folder)] if names else [])}
            for name, (_, content) in zip(names, contents, strict=True):
                write_bytes(place.parent / name, content)
            images = {"image": names[0] if len(names) == 1 else names} if names else {}
            record = {"id": place.stem, **images, "conversations": _said(conversation)}
            (write_json_lines if place.suffix == ".jsonl" else write_json)(place, [record])


def _name(folder: Path, number: int, name: str) -> str:
    """An image's name in the record."""
    return f"{folder.name}/{number}{Path(name).suffix.lower() or '.png'}"


def _said(conversation: Conversation) -> list[dict[str, Any]]:
    said = []
    for turn in conversation.turns:
        if turn.answer is not None:
            shown = f"{IMAGE_TOKEN}\n" * len(turn.pictures)
            said.append({"from": "human", "value": shown + turn.question})
            said.append({"from": "gpt", "value": without_placeholder(turn.answer)})
    return said
