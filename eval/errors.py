"""What can go wrong in an evaluation, as the command line tells it."""

from llava_skip.errors import UserError, first_few

__all__ = ["EvalError", "JudgeUnavailable", "first_few"]


class EvalError(UserError):
    """A wrong path, file, column or option: the message says what was seen, what was expected and what to change."""


class JudgeUnavailable(RuntimeError):
    """The judge endpoint gave no usable reply, so grading is incomplete; this is never a score of zero."""
