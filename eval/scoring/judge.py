"""A language model that grades answers, reached over the OpenAI chat protocol at any address."""

import asyncio
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tenacity import (
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    wait_random_exponential,
)
from tqdm import tqdm

from eval.errors import JudgeUnavailable
from llava_skip_base.console import print_text
from llava_skip_base.errors import UserError, first_few
from llava_skip_base.files import parse_json, read_json, write_json, writing

DEFAULT_JUDGE = "gpt-4-0613"
LONGEST_PAUSE = 600.0
LONGEST_REPLY = 10_000_000
# The endpoint counts as down after this many questions in a row without a reply.
DOWN_AFTER = 3
# Statuses that may be gone at the next request: time-outs, too many requests and errors of the server.
_TEMPORARY = {408, 409, 425, 429, *range(500, 600)}

Item = TypeVar("Item")
Result = TypeVar("Result")


class _TryAgain(Exception):
    """A request failed for a reason that may be temporary; `pause` is the seconds that the endpoint asked to wait."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class _NotSent(Exception):
    """A dry run printed the request instead of sending it."""


@dataclass
class Judge:
    """A chat model at an OpenAI-compatible address. The key is read from ``OPENAI_API_KEY`` and is not stored.

    Attributes:
        url: base URL, such as ``http://localhost:8000/v1``.
        folder: where grades are kept, so that an interrupted grading can continue.
        label: name of what is graded, for the names of files there.
        model: the model's name at that address.
        runs: how often each answer is graded.
        retries: how often a failed request is repeated, with growing pauses or those that the endpoint asks for.
        timeout: seconds for one reply, from the request to its last byte.
        concurrency: requests at the same time.
        budget: most requests to send, repeated ones included; None for no limit.
        dry_run: print the requests and send nothing.
        prompt: the text before what is graded, where the benchmark's official one is used instead of the project's.
        backoff: longest first pause in seconds; doubled with each retry, up to 30 s.
        sent: requests sent so far, or printed in a dry run.
    """

    url: str
    folder: Path
    label: str
    model: str = DEFAULT_JUDGE
    runs: int = 1
    retries: int = 6
    timeout: float = 60.0
    concurrency: int = 4
    budget: int | None = None
    dry_run: bool = False
    prompt: str | None = None
    backoff: float = 0.5
    sent: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Check the options before anything is asked."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"judge URL '{self.url}': expected http://HOST/v1 or https://HOST/v1.")
        if "@" in parts.netloc or parts.query:
            raise UserError(
                "the judge URL holds a user or a query, which process lists show; give the bare address, and the key "
                "in the environment variable OPENAI_API_KEY."
            )
        for name in ("runs", "concurrency", "budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"judge {name} {value}: expected 1 or more.")
        if self.timeout <= 0:
            raise UserError(f"judge timeout {self.timeout}: expected a number of seconds above 0.")
        if not os.environ.get("OPENAI_API_KEY", "").isascii():
            raise UserError("OPENAI_API_KEY holds characters that no key has; set it again.")
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def describe(self) -> dict[str, Any]:
        """The judge's model, address, number of runs and the hash of a prompt that was given, for the result file."""
        prompt = {} if self.prompt is None else {"prompt_sha256": digest(self.prompt)}
        return {"model": self.model, "url": self.url, "runs": self.runs, **prompt}

    def ask(self, prompt: str, temperature: float, max_tokens: int) -> str:
        """The text of the reply to one user message.

        Raises:
            JudgeUnavailable: if no chat completion came back after all retries, or the budget is used up.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        if self.dry_run:
            self._count()
            print_text(json.dumps(body, ensure_ascii=False))
            raise _NotSent
        attempts = Retrying(
            retry=retry_if_exception_type(_TryAgain),
            stop=stop_after_attempt(self.retries + 1),
            wait=self._pause,
            sleep=sleep_using_event(self._stop),
        )
        try:
            return attempts(self._ask_once, body)
        except RetryError as error:
            reason = error.last_attempt.exception()
            raise JudgeUnavailable(f"judge at {self.url}: {reason} after {self.retries} retries.") from None

    def map(self, ask: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        """Call `ask` for many items at once, and yield each item with its result as soon as that is there.

        Raises:
            JudgeUnavailable: if an item got no reply; raised after all items with a reply were yielded. The rest is
                not asked once `DOWN_AFTER` items in a row got none.
        """
        failed: list[JudgeUnavailable] = []
        in_a_row = 0
        _ = self._client, self._loop  # made before the threads start, or each could make one
        with (
            ThreadPoolExecutor(1 if self.dry_run else self.concurrency) as pool,
            tqdm(total=len(items), desc=f"judge {self.model}", unit="answer", disable=self.dry_run or None) as progress,
        ):
            jobs = {pool.submit(ask, item): item for item in items}
            try:
                for job in as_completed(jobs):
                    progress.update()
                    try:
                        result = job.result()
                    except _NotSent:
                        continue
                    except JudgeUnavailable as error:
                        failed.append(error)
                        in_a_row += 1
                        if in_a_row >= DOWN_AFTER:
                            self._stop.set()  # ends the pauses between attempts, and the attempts
                        continue
                    in_a_row = 0
                    yield jobs[job], result
            finally:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                self._stop.clear()
        if failed:
            raise failed[0]

    def file(self, kind: str) -> Path:
        """The file of this judge's replies of a `kind`, named as MM-Vet's official grader does."""
        return self.folder / f"{self.label}_{file_part(self.model)}-{kind}.json"

    def _count(self) -> None:
        with self._lock:
            if self.budget is not None and self.sent >= self.budget:
                raise JudgeUnavailable(f"the budget of {self.budget} requests is used up.")
            self.sent += 1

    def _pause(self, state: RetryCallState) -> float:
        asked = getattr(state.outcome.exception() if state.outcome else None, "pause", None)
        return wait_random_exponential(multiplier=self.backoff, max=30)(state) if asked is None else asked

    @cached_property
    def _client(self) -> Any:
        import httpx  # needed only where answers are graded

        key = os.environ.get("OPENAI_API_KEY", "").strip()
        headers = {"Accept-Encoding": "identity"}  # a small compressed reply can be of any size
        if key:
            headers["Authorization"] = f"Bearer {key}"
        return httpx.AsyncClient(headers=headers, timeout=None, limits=httpx.Limits(max_connections=None))

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """Where requests run: only there has a whole request one time limit, whatever the endpoint sends, and when."""
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True, name="judge").start()
        return loop

    def _ask_once(self, body: dict[str, Any]) -> str:
        import httpx

        if self._stop.is_set():
            raise JudgeUnavailable(f"judge at {self.url}: given up, since other questions got no reply.")
        self._count()
        try:
            return _content(self._post(body))
        except httpx.TransportError as error:
            raise _TryAgain(type(error).__name__) from None

    def _post(self, body: dict[str, Any]) -> bytes:
        """Send a request and read its reply; connection, headers and body have one time limit together."""
        request = asyncio.wait_for(self._exchange(body), self.timeout)
        try:
            return asyncio.run_coroutine_threadsafe(request, self._loop).result()
        except asyncio.TimeoutError:
            raise _TryAgain(f"no whole reply within {self.timeout:g} s") from None

    async def _exchange(self, body: dict[str, Any]) -> bytes:
        reply = bytearray()
        address = f"{self.url.rstrip('/')}/chat/completions"
        async with self._client.stream("POST", address, json=body) as response:
            status = response.status_code
            if status in _TEMPORARY:
                raise _TryAgain(f"HTTP {status}", self._asked_pause(response.headers.get("retry-after", "")))
            if status != 200:
                # The body of an error may repeat parts of the key, so only the status is reported.
                raise JudgeUnavailable(f"judge at {self.url}: HTTP {status}.")
            if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
                raise _TryAgain("a compressed reply, which was not asked for")
            async for block in response.aiter_raw():
                reply += block
                if len(reply) > LONGEST_REPLY:
                    raise _TryAgain("an endless reply")
        return bytes(reply)

    def _asked_pause(self, header: str) -> float | None:
        seconds = parse_retry_after(header)
        if seconds is not None and seconds > LONGEST_PAUSE:
            raise JudgeUnavailable(f"judge at {self.url}: asks to wait for {seconds:.0f} s.")
        return seconds


def file_part(name: str) -> str:
    """A model's name as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", name)


def save_replies(path: Path, replies: Mapping[str, Any]) -> None:
    """Write the replies so far, by id."""
    with writing(path):
        write_json(path, replies)


def read_replies(path: Path, asked: Mapping[str, str], **fields: type) -> dict[str, dict[str, Any]]:
    """The replies of an earlier run by id, if there are any.

    Args:
        path: the file.
        asked: the question to the judge by id.
        **fields: what each reply holds.

    Raises:
        UserError: if the file has replies about other answers, or is not of this form.
    """
    entries = read_json(path) if path.exists() else {}
    if not isinstance(entries, dict):
        raise UserError(f"{path}: expected replies by id, saw a {type(entries).__name__}; move it away.")
    broken = [id_ for id_, entry in entries.items() if not _holds(entry, fields if id_ in asked else {})]
    if broken:
        raise UserError(f"{path}: its replies on {first_few(broken)} questions are damaged; move it away.")
    stale = [id_ for id_, entry in entries.items() if id_ in asked and entry.get("asked") != digest(asked[id_])]
    if stale:
        raise UserError(f"{path}: its replies on {first_few(stale)} questions are of other answers; move it away.")
    return entries


def _holds(entry: Any, fields: Mapping[str, type]) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in fields.items())


def digest(question: str) -> str:
    """Hash a question, to recognise it in a later run."""
    return hashlib.sha256(question.encode()).hexdigest()


def parse_retry_after(header: str) -> float | None:
    """Read a Retry-After header (RFC 9110): seconds or a date; None if it is neither."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(timezone.utc)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a time zone
        return None


def _content(reply: bytes) -> str:
    """The text of a chat completion."""
    try:
        content = parse_json(reply.decode("utf-8-sig"))["choices"][0]["message"]["content"]
        if content is None or isinstance(content, str):
            return content or ""
    except (ValueError, LookupError, TypeError):
        pass
    raise _TryAgain("replies that are no chat completions")
