"""A language model that grades answers, reached over the OpenAI chat protocol at any address."""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tenacity import RetryError, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from eval.errors import EvalError, JudgeUnavailable

DEFAULT_JUDGE = "gpt-4-0613"
_NO_KEY = "none"


class _MalformedReply(Exception):
    """The endpoint answered, but not with a chat completion."""


@dataclass
class Judge:
    """A chat model at an OpenAI-compatible address. The key is read from ``OPENAI_API_KEY`` and kept nowhere else.

    Attributes:
        url: base URL, such as ``http://localhost:8000/v1``.
        folder: where grades are kept, so that grading can go on after a break.
        label: name of what is graded, for the names of files there.
        model: the model's name at that address.
        runs: how often each answer is graded.
        retries: how often a failed request is repeated, with growing pauses.
        timeout: seconds to wait for one reply.
    """

    url: str
    folder: Path
    label: str
    model: str = DEFAULT_JUDGE
    runs: int = 1
    retries: int = 6
    timeout: float = 60.0

    def __post_init__(self) -> None:
        """Check the options before anything is asked."""
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise EvalError(f"judge URL '{self.url}': expected http://HOST/v1 or https://HOST/v1.")
        if self.runs < 1:
            raise EvalError(f"judge runs {self.runs}: expected 1 or more.")

    def describe(self) -> dict[str, Any]:
        """Say who graded, without anything secret that a URL may carry."""
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition("@")[2]
        return {"model": self.model, "url": f"{parts.scheme}://{host}{parts.path}", "runs": self.runs}

    @cached_property
    def _client(self) -> Any:
        import openai  # slow to import, and needed only where answers are graded

        key = os.environ.get("OPENAI_API_KEY") or _NO_KEY  # a local server needs none, the client insists on one
        return openai.OpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=self.retries)

    def ask(self, prompt: str, temperature: float, max_tokens: int) -> str:
        """Put one user message and return the reply's text.

        Args:
            prompt: the message.
            temperature: sampling temperature.
            max_tokens: length limit of the reply.

        Raises:
            JudgeUnavailable: if no chat completion came back after all retries.
        """
        attempts = Retrying(
            retry=retry_if_exception_type(_MalformedReply),
            stop=stop_after_attempt(self.retries + 1),
            wait=wait_random_exponential(multiplier=0.5, max=8),
        )
        try:
            return attempts(self._ask_once, prompt, temperature, max_tokens)
        except RetryError as error:
            raise JudgeUnavailable(f"judge at {self.describe()['url']}: replies are no chat completions.") from error

    def _ask_once(self, prompt: str, temperature: float, max_tokens: int) -> str:
        import openai

        try:
            reply = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=temperature,
                max_tokens=max_tokens,
            )
        except (json.JSONDecodeError, openai.APIResponseValidationError) as error:
            raise _MalformedReply from error
        except openai.APIError as error:
            # The body of an error may repeat parts of the key, so only its kind is told.
            status = getattr(error, "status_code", None)
            kind = type(error).__name__ + (f", HTTP {status}" if status else "")
            raise JudgeUnavailable(f"judge at {self.describe()['url']}: {kind} after {self.retries} retries.") from None
        choices = getattr(reply, "choices", None)
        message = getattr(choices[0], "message", None) if choices else None
        if message is None:
            raise _MalformedReply
        return message.content or ""
