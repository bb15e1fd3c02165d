"""What can go wrong in an evaluation besides a `UserError`."""

from llava_skip.errors import UserError, first_few

__all__ = ["EvalError", "JudgeUnavailable", "first_few"]

EvalError = UserError


class JudgeUnavailable(RuntimeError):
    """The judge endpoint gave no usable reply, so grading is incomplete; this is never a score of zero."""
