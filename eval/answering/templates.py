"""Chat templates are programs of others: their errors are one message, and they have a time limit."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from llava_skip_base.errors import UserError
from llava_skip_base.texts import shortened

SECONDS = 20.0
"""For the text of a batch, which takes milliseconds."""
_RAISED = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What expressions in a template can raise."""
_QUESTION = "Which?"
_PROBES: tuple[Any, ...] = (_QUESTION, [{"type": "image"}, {"type": "text", "text": _QUESTION}])
"""What a user can say, in the forms that templates take."""


def check_template(folder: Path, processor: Any, takes_images: bool) -> None:
    """Refuse a chat template that writes no question of any form, before the weights are loaded.

    Raises:
        UserError: its error, or that it does not end.
    """
    errors = []
    for content in _PROBES if takes_images else _PROBES[:1]:
        try:
            render(folder, processor, [[{"role": "user", "content": content}]])
            return
        except UserError as error:
            errors.append(error)
            if isinstance(error.__cause__, TimeoutError):
                break
    raise errors[-1]


def render(folder: Path, processor: Any, conversations: Sequence[list[dict[str, Any]]]) -> list[str]:
    """The texts of conversations by the processor's chat template.

    Raises:
        UserError: the template raises an error, or does not end within `SECONDS`.
    """
    try:
        with _time_limit(SECONDS):
            return processor.apply_chat_template(list(conversations), add_generation_prompt=True, tokenize=False)
    except TimeoutError as error:
        raise UserError(
            f"{folder}: its chat template does not end within {SECONDS:g} s; save the model with another one "
            "(python -m llava_skip.convert SOURCE OUTPUT --template NAME does)."
        ) from error
    except _RAISED as error:
        raise UserError(
            f"{folder}: its chat template fails ({type(error).__name__}: {shortened(error, 200)}); correct it, or save "
            "the model with another one (python -m llava_skip.convert SOURCE OUTPUT --template NAME does)."
        ) from error


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
