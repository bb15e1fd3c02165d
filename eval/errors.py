"""What can go wrong in an evaluation, as the command line tells it."""

from llava_skip.errors import UserError


class EvalError(UserError):
    """A wrong path, file, column or option: the message says what was seen, what was expected and what to change."""


class JudgeUnavailable(RuntimeError):
    """The judge endpoint gave no usable reply, so grading is incomplete; this is never a score of zero."""


def some(values: list, limit: int = 5) -> str:
    """Name the first few of a list of offenders, with their total number.

    Args:
        values: ids, paths or names.
        limit: how many to spell out.
    """
    names = ", ".join(str(value) for value in values[:limit])
    return f"{len(values)} ({names}{', ...' if len(values) > limit else ''})"
