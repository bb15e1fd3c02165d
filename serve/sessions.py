"""Conversations of the people who have a page open, each with one or more models side by side.

A model answers one question at a time. Of many open pages, those that were used last keep the caches of their turns:
the others read their conversation again with their next question. Nothing here knows of the page.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TypeVar

from llava_skip_base.errors import UserError
from serve.answering import Answerer, Cost
from serve.conversation import Conversation, Picture
from serve.loading import Loaded

KEPT_CACHES = 4
"""Sessions that keep the caches of their turns."""
MOST_PICTURES = 64
"""Images of one conversation."""
KEPT_SESSIONS = 32
"""Sessions that keep their conversations."""

T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    """A model that pages ask, and its name on them."""

    name: str
    loaded: Loaded
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)


@dataclass(frozen=True)
class Settings:
    """What a user chooses for an answer, see `Answerer`."""

    max_new_tokens: int
    temperature: float


class Side:
    """One model in a session: its conversation, and what became of the last question.

    Attributes:
        model: that answers.
        conversation: so far.
        text: of the answer that is being made; None while there is none.
        cost: of the last answer; None before the first, and where there was none.
        fault: why the last question has no answer; "" if it has.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.conversation = Conversation()
        self.answerer = Answerer(model.loaded, 1, advice="clear the conversation to begin again")
        self.text: str | None = None
        self.cost: Cost | None = None
        self.fault = ""

    def ask(
        self, question: str, pictures: Sequence[Picture], settings: Settings, is_stopped: Callable[[], bool]
    ) -> Generator[None]:
        """Answer a question; yields whenever `text` has grown.

        A question that fails is taken back, with its images, and `fault` says why.
        """
        self.conversation.waiting = list(pictures)
        try:
            turn = self.conversation.ask(question)
        except UserError as error:
            self.conversation.waiting, self.fault = [], str(error)
            return

        def answer(show: Callable[[str], None]) -> tuple[str, Cost]:
            with self.model.lock:
                self.answerer.max_new_tokens, self.answerer.temperature = settings.max_new_tokens, settings.temperature
                return self.answerer.answer(self.conversation, show, is_stopped)

        self.text = ""
        try:
            yield
            with closing(text_of(answer)) as pieces:
                try:
                    while True:
                        self.text += next(pieces)
                        yield
                except StopIteration as ended:
                    turn.answer, self.cost = ended.value
        except UserError as error:
            self.fault = str(error)
        finally:
            self.text = None
            if turn.answer is None:
                self.conversation.take_back()
                self.conversation.waiting = []

    def clear(self) -> None:
        """Begin again."""
        self.conversation.clear()
        self.answerer.clear()
        self.text, self.cost, self.fault = None, None, ""


class Session:
    """What one open page has: a side for each model.

    Attributes:
        sides: in the order of the models.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        self.sides = [Side(model) for model in models]
        self._stop = threading.Event()
        self._busy = threading.Lock()

    def ask(self, question: str, pictures: Sequence[Picture], settings: Settings) -> Generator[None]:
        """Let one model after the other answer a question; yields whenever something has changed.

        Raises:
            UserError: an earlier question of this session is still being answered, or there are too many images.
        """
        if not self._busy.acquire(blocking=False):
            raise UserError("the question before is still being answered: wait for it, or stop it.")
        try:
            self._stop.clear()
            if max(len(side.conversation.pictures) for side in self.sides) + len(pictures) > MOST_PICTURES:
                raise UserError(f"a conversation takes at most {MOST_PICTURES} images: clear it to begin again.")
            for side in self.sides:
                side.cost, side.fault = None, ""
            for side in self.sides:
                if self._stop.is_set():
                    break
                with closing(side.ask(question, pictures, settings, self._stop.is_set)) as steps:
                    for _ in steps:
                        try:
                            yield
                        except GeneratorExit:  # the page was closed: nobody waits for the rest of the answer
                            self._stop.set()
                            raise
        finally:
            self._busy.release()

    def stop(self) -> None:
        """End the answer that is being made after its next token; other models are then not asked."""
        self._stop.set()

    def clear(self) -> None:
        """Forget all turns.

        Raises:
            UserError: a question is being answered.
        """
        if not self._busy.acquire(blocking=False):
            raise UserError("a question is being answered: stop it first.")
        try:
            for side in self.sides:
                side.clear()
        finally:
            self._busy.release()


class Sessions:
    """The sessions of all open pages, by their keys.

    Args:
        models: that each of them asks.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        self.models = models
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Session:
        """The session of a page; a new one at first, and where so many others came since that it was left out."""
        with self._lock:
            session = self._sessions.setdefault(key, Session(self.models))
            self._sessions.move_to_end(key)
            while len(self._sessions) > KEPT_SESSIONS:
                self._sessions.popitem(last=False)[1].stop()
            for other in list(self._sessions.values())[:-KEPT_CACHES]:
                for side in other.sides:
                    side.answerer.clear()
            return session

    def remove(self, key: str) -> None:
        """End the session of a page that was closed."""
        with self._lock:
            if (session := self._sessions.pop(key, None)) is not None:
                session.stop()

    def __len__(self) -> int:
        return len(self._sessions)


def text_of(work: Callable[[Callable[[str], None]], T]) -> Generator[str, None, T]:
    """Text as it comes from a call, which runs in a thread of its own; several pieces that wait come as one.

    Args:
        work: gets a function that takes the pieces.

    Returns:
        What `work` returns, as the generator's value.
    """
    pieces: SimpleQueue[str | None] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(work, pieces.put)
        result.add_done_callback(lambda _: pieces.put(None))
        while True:
            waiting = [pieces.get()]
            with suppress(Empty):
                while True:
                    waiting.append(pieces.get_nowait())
            if text := "".join(piece for piece in waiting if piece is not None):
                yield text
            if waiting[-1] is None:
                return result.result()
