"""The number formats in which a saved model answers."""

from __future__ import annotations

from llava_skip_base.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


def dtype_name(name: str | None, device: str) -> str:
    """The format of a name; bfloat16 on a GPU and float32 elsewhere, without one.

    Args:
        name: of the option `--dtype`, one of `DTYPES`.
        device: kind of the device, "cuda" or another.

    Raises:
        UserError: the name is unknown.
    """
    if name is not None and name not in DTYPES:
        raise UserError(f"--dtype is {name!r}; choose one of {', '.join(DTYPES)}.")
    return name or ("bfloat16" if device == "cuda" else "float32")
