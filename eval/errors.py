"""What can go wrong in an evaluation and is no user's mistake."""


class JudgeUnavailable(RuntimeError):
    """The judge endpoint gave no usable reply, so grading is incomplete; this is never a score of zero."""
