"""The application of `transformers serve` with one model of the library: its handler, its thread, its responses.

transformers' own loader knows models by two fixed tables and loads what a request names. Here its model manager has
one model, which is loaded, and loads nothing. `serve.answering` makes prompt and answer, so that the first token, the
template and the ends are those of the chat. Needs the extra `[serve]`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState, _StreamError

from llava_skip_base.console import print_aside
from llava_skip_base.errors import UserError
from serve.answering import Answerer, Cost
from serve.chat_request import ChatRequest, Limits, RequestError, error_body, read_request
from serve.conversation import Picture
from serve.loading import Loaded

ADVICE = "send fewer turns, or fewer or smaller images"
_CLOSING_SECONDS = 10.0
_FAILED = "the server failed; its log says why"

_log = logging.getLogger(__name__)


class Job:
    """An answer on its way: made in the thread of the model, read in the event loop.

    transformers' handler takes it for a manager that generates one answer, and for its streamer.

    Attributes:
        queue: pieces of the answer, then None, or an error.
        begun: set with the first of them.
        ended: set when the thread is through with it.
        prompt: token ids of the prompt, once it has begun.
        text: the answer.
        total_tokens: of the answer, its end included.
        config: of what transformers' responses ask, whether the answer was cut.
        cost: of the answer, once it has ended.
        error: what was raised instead of an answer.
    """

    def __init__(self, request: ChatRequest) -> None:
        self.request = request
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.begun, self.ended = asyncio.Event(), asyncio.Event()
        self.prompt: Sequence[int] = ()
        self.text, self.total_tokens = "", 0
        self.config = GenerationConfig(max_new_tokens=None)
        self.cost: Cost | None = None
        self.error: BaseException | None = None
        self._loop, self._stop, self._deadline = asyncio.get_running_loop(), threading.Event(), float("inf")

    def cancel(self) -> None:
        """Let the answer end with its next token, or not begin."""
        self._stop.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for it."""
        return self._stop.is_set()

    def is_over(self) -> bool:
        """Whether it should end with the token that is being made."""
        return self.is_cancelled or time.monotonic() > self._deadline

    def start_clock(self, seconds: float) -> None:
        """From now on it has so much time."""
        self._deadline = time.monotonic() + seconds

    def show(self, prompt: Sequence[int], piece: str) -> None:
        """Called in the thread with each piece."""
        self.prompt = prompt
        self._loop.call_soon_threadsafe(self._put, piece)

    def _put(self, item: Any) -> None:
        self.queue.put_nowait(item)
        self.begun.set()

    def finish(self, done: asyncio.Future[tuple[str, Sequence[int], Cost] | None]) -> None:
        """Called in the event loop when the thread is through."""
        self.error = done.exception()
        result = None if self.error is not None else done.result()
        if result is not None:
            self.text, self.prompt, self.cost = result
            self.total_tokens = self.cost.tokens
            self.config.max_new_tokens = None if self.cost.complete else self.cost.tokens
        is_late = self.begun.is_set() and self.error is not None
        if is_late and not isinstance(self.error, UserError):
            _log.error("an answer failed after it had begun", exc_info=self.error)
        # transformers writes the message between quotes, as it is
        self._put(_StreamError(json.dumps(_message(self.error))[1:-1]) if is_late else None)
        self.ended.set()

    def generate_streaming(self, *args: Any, **kwargs: Any) -> tuple[asyncio.Queue[Any], Job]:
        """The pieces of the answer, and where it can be cancelled."""
        return self.queue, self

    async def generate_non_streaming(self, *args: Any, **kwargs: Any) -> tuple[str, int, Sequence[int]]:
        """The text, the length of the prompt, and as many numbers as the answer has tokens.

        Raises:
            UserError: the answer does not fit into the device's memory.
        """
        await self.ended.wait()
        if self.error is not None:
            raise self.error
        return self.text, len(self.prompt), range(self.total_tokens)


class Answers(GenerateManager):
    """transformers' thread, which makes one answer after another; each can be ended.

    Args:
        loaded: the model.
        limits: of a request.
    """

    def __init__(self, loaded: Loaded, limits: Limits) -> None:
        super().__init__()
        self._loaded, self._limits = loaded, limits
        self._answerer = Answerer(loaded, limits.new_tokens, exact=True, advice=ADVICE)
        self._jobs: dict[str, Job] = {}
        self._pictures: Mapping[bytes, Picture] = {}

    async def begin(self, request: ChatRequest, request_id: str) -> Job:
        """Wait for a request's turn, and for the first piece of its answer. `end` must be called after it.

        Raises:
            UserError: the images or the length of the conversation are refused.
        """
        job = self._jobs[request_id] = Job(request)
        self.async_submit(self._answer, job, request_id).add_done_callback(job.finish)
        await job.begun.wait()
        if job.error is not None and job.ended.is_set():
            raise job.error
        return job

    def end(self, request_id: str) -> None:
        """Nobody waits for this answer: end it if it is not through."""
        if job := self._jobs.pop(request_id, None):
            job.cancel()

    def close(self) -> None:
        """End all answers, and wait until the thread does nothing."""
        for request_id in list(self._jobs):
            self.end(request_id)
        with suppress(FutureTimeoutError):  # a long step goes on; the thread ends with the process
            self.submit(lambda: None).result(_CLOSING_SECONDS)

    def _answer(self, job: Job, request_id: str) -> tuple[str, Sequence[int], Cost] | None:
        """In the thread: the answer, or None if nobody waits for it any more."""
        if job.is_cancelled:
            return None
        job.start_clock(self._limits.seconds)
        answerer, request = self._answerer, job.request
        asked, pictures = request.opened(self._loaded.processor, self._limits, self._pictures)
        if request.seed is not None:
            torch.manual_seed(request.seed)
        try:
            text, cost = answerer.answer(
                asked, lambda piece: job.show(answerer.prompt, piece), job.is_over, request.options
            )
        finally:
            self._pictures = pictures if answerer.goes_on else {}  # a next turn is known by its images
        print_aside(f"{request_id}: {cost}")
        return text, answerer.prompt, cost


class ChatHandler(ChatCompletionHandler):
    """transformers' handler of chat completions: requests are read here, responses are written there.

    Args:
        answers: makes the answers.
        name: of the model.
        limits: of a request.
    """

    def __init__(
        self, manager: ServedModel, state: GenerationState, loaded: Loaded, answers: Answers, name: str, limits: Limits
    ) -> None:
        super().__init__(manager, state)
        self._model, self._answers, self._name, self._limits = loaded.model, answers, name, limits

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a chat completion.

        Raises:
            UserError: it is refused.
        """
        request = read_request(body, self._name, self._limits)
        job = await self._answers.begin(request, request_id)
        # Without a processor transformers looks for no parts in an answer (thoughts, calls of tools): it is its text.
        arguments = (request_id, self._model, None, self._name, {"input_ids": list(job.prompt)}, job.config, job)
        if not request.stream:
            return await self._non_streaming(*arguments)
        response = self._streaming(*arguments)
        response.body_iterator = _closed(response.body_iterator, job)
        return response


async def _closed(parts: AsyncIterator[str], job: Job) -> AsyncIterator[str]:
    """The events of a stream and the last one, which OpenAI's has and transformers' has not."""
    async for part in parts:
        yield part
    if job.error is None:
        yield "data: [DONE]\n\n"


class ServedModel(ModelManager):
    """transformers' manager of models, with one that is loaded already."""

    def __init__(self, answers: Answers, name: str) -> None:
        super().__init__(device="cpu")  # of the models that it would load
        self._answers = answers
        self._entry = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "llava-skip"}

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The model, and none of those in transformers' cache."""
        return [self._entry]

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
        """Load nothing.

        Raises:
            RequestError: always.
        """
        raise RequestError(f"this server has {self._entry['id']!r} and loads no other model", "model")

    def shutdown(self) -> None:
        """End what goes on: called when the server ends."""
        self._answers.close()


class _Closed:
    """Stands for a handler whose path is closed."""

    async def handle_request(self, *args: Any) -> Any:
        raise RequestError("this is not served", code="closed", status=404)


def build_app(loaded: Loaded, name: str, limits: Limits) -> tuple[FastAPI, Answers]:
    """The application, and what makes its answers. It must stand behind `serve.door.Door`.

    Args:
        loaded: the model.
        name: that requests must give it.
        limits: of a request.
    """
    answers, state, closed = Answers(loaded, limits), GenerationState(), _Closed()
    manager = ServedModel(answers, name)
    chat = ChatHandler(manager, state, loaded, answers, name, limits)
    app = build_server(manager, chat, closed, closed, closed, closed, state)
    for kind in (UserError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _as_json)
    return app, answers


async def _as_json(request: Request, error: Exception) -> JSONResponse:
    """An error in the form of OpenAI's interface."""
    if isinstance(error, RequestValidationError):
        error = RequestError("the request is no JSON object")
    status = getattr(error, "status", getattr(error, "status_code", 400 if isinstance(error, UserError) else 500))
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return JSONResponse(error_body(_message(error), status, param, code), status_code=status)


def _message(error: BaseException | None) -> str:
    """What a client is told of an error: of a fault of the program nothing."""
    if isinstance(error, HTTPException):
        return str(error.detail)
    return str(error) if isinstance(error, UserError) else _FAILED
