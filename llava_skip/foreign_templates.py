"""Chat templates are programs of others: their errors are one message, and they have a time limit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError

from llava_skip_base.errors import UserError
from llava_skip_base.texts import shortened

SECONDS = 20.0
"""For the text of a batch, which takes milliseconds."""
_RAISED = (
    TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
)  # fmt: skip
"""What expressions in a template can raise."""


class EndlessTemplate(UserError):
    """A template that does not end."""


@contextmanager
def calling_template(name: str, advice: str) -> Iterator[None]:
    """Around the rendering of a template alone.

    Args:
        name: of the template, as the beginning of a message.
        advice: what to do, as its end.

    Raises:
        UserError: the template raised an error, or refuses the conversation.
        EndlessTemplate: it took longer than `SECONDS`.
    """
    try:
        with _time_limit(SECONDS):
            yield
    except TimeoutError as error:
        raise EndlessTemplate(f"{name} does not end within {SECONDS:g} s; {advice}") from error
    except _RAISED as error:
        raise UserError(f"{name} fails ({type(error).__name__}: {shortened(error, 200)}); {advice}") from error


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after some time. Only the main thread, in which models answer, can be interrupted so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
