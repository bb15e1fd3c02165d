"""A language model that grades answers, reached over the OpenAI chat protocol at any address."""

import hashlib
import json
import os
import re
import threading
import time
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
from llava_skip_base.errors import UserError, first_few

DEFAULT_JUDGE = "gpt-4-0613"
LONGEST_PAUSE = 600.0
LONGEST_REPLY = 10_000_000
# After so many questions in a row without a reply the endpoint counts as down.
DOWN_AFTER = 3
# Statuses that a later request may not meet: time-outs, too many requests and faults of the server.
_PASSING = {408, 409, 425, 429, *range(500, 600)}

Item = TypeVar("Item")
Result = TypeVar("Result")


class _TryAgain(Exception):
    """A request failed in a way that may pass.

    Attributes:
        pause: seconds that the endpoint asked to wait, if it did.
    """

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class _NotSent(Exception):
    """A dry run has shown the request instead of sending it."""


@dataclass
class Judge:
    """A chat model at an OpenAI-compatible address. The key is read from ``OPENAI_API_KEY`` and kept nowhere else.

    Attributes:
        url: base URL, such as ``http://localhost:8000/v1``.
        folder: where grades are kept, so that grading can go on after a break.
        label: name of what is graded, for the names of files there.
        model: the model's name at that address.
        runs: how often each answer is graded.
        retries: how often a failed request is repeated, with growing pauses or those that the endpoint asks for.
        timeout: seconds for one reply, from the request to its last byte.
        concurrency: requests under way at once.
        budget: most requests to send, repeated ones included; None for no limit.
        dry_run: show what would be asked and send nothing.
        backoff: seconds of the first pause, doubled from time to time.
        sent: requests sent so far, or shown in a dry run.
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
        """Say who graded."""
        return {"model": self.model, "url": self.url, "runs": self.runs}

    def ask(self, prompt: str, temperature: float, max_tokens: int) -> str:
        """Put one user message and return the reply's text.

        Args:
            prompt: the message.
            temperature: sampling temperature.
            max_tokens: length limit of the reply.

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
            print(json.dumps(body, ensure_ascii=False))
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
        """Ask about many things at once and yield what is known as soon as it is.

        Args:
            ask: asks the judge about one item, through ``ask``.
            items: what to ask about.

        Raises:
            JudgeUnavailable: if an item got no reply; raised after everything that did get one has been yielded. Items
                are given up early once several in a row got none.
        """
        failed: list[JudgeUnavailable] = []
        in_a_row = 0
        _ = self._client  # made before threads could make two
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
                            self._stop.set()  # wakes those that wait for their next attempt, and makes them give up
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
        """Name the file that keeps this judge's replies, as MM-Vet's official grader does.

        Args:
            kind: what the replies are.
        """
        model = re.sub(r"[^\w.-]+", "-", self.model)
        return self.folder / f"{self.label}_{model}-{kind}.json"

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
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(headers=headers, timeout=self.timeout)

    def _ask_once(self, body: dict[str, Any]) -> str:
        import httpx

        if self._stop.is_set():
            raise JudgeUnavailable(f"judge at {self.url}: given up, since other questions got no reply.")
        self._count()
        try:
            return _content(self._post(body))
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _TryAgain(type(error).__name__) from None

    def _post(self, body: dict[str, Any]) -> bytes:
        """Send a request and read its reply within the time limit, which a slow stream of bytes cannot extend."""
        deadline = time.monotonic() + self.timeout
        reply = b""
        with self._client.stream("POST", f"{self.url.rstrip('/')}/chat/completions", json=body) as response:
            status = response.status_code
            if status in _PASSING:
                raise _TryAgain(f"HTTP {status}", self._asked_pause(response.headers.get("retry-after", "")))
            if status != 200:
                # The body of an error may repeat parts of the key, so only its kind is told.
                raise JudgeUnavailable(f"judge at {self.url}: HTTP {status}.")
            for block in response.iter_bytes():
                reply += block
                if time.monotonic() > deadline:
                    raise _TryAgain(f"no whole reply within {self.timeout:g} s")
                if len(reply) > LONGEST_REPLY:
                    raise _TryAgain("an endless reply")
        return reply

    def _asked_pause(self, header: str) -> float | None:
        seconds = parse_retry_after(header)
        if seconds is not None and seconds > LONGEST_PAUSE:
            raise JudgeUnavailable(f"judge at {self.url}: asks to wait for {seconds:.0f} s.")
        return seconds


def read_replies(path: Path, asked: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Read what a judge has said in an earlier run, after checking that it was about the same.

    Args:
        path: a file of entries by id, each with the hash of what was asked; it need not exist.
        asked: the question to the judge, by id.

    Raises:
        UserError: if it holds replies about other answers.
    """
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    stale = [id_ for id_, entry in entries.items() if id_ in asked and entry.get("asked") != digest(asked[id_])]
    if stale:
        raise UserError(f"{path}: its replies on {first_few(stale)} questions are of other answers; move it away.")
    return entries


def digest(question: str) -> str:
    """Hash a question, to know it again."""
    return hashlib.sha256(question.encode()).hexdigest()


def parse_retry_after(header: str) -> float | None:
    """Read a Retry-After header (RFC 9110): seconds or a date; None where it is neither.

    Args:
        header: the header's value.
    """
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(timezone.utc)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a time zone
        return None


def _content(reply: bytes) -> str:
    """Take the text out of a chat completion."""
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise _TryAgain("replies that are no chat completions") from None
    if content is not None and not isinstance(content, str):
        raise _TryAgain("replies that are no chat completions")
    return content or ""
