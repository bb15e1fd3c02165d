"""What answers: `generate` of transformers, or vLLM's engine."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from llava_skip_base.errors import UserError

if TYPE_CHECKING:
    from eval.answering.generate import Numerics

ENGINES = ("transformers", "vllm")


def check_engine(name: str, attn: str | None, processes: int | None) -> int | None:
    """Check the choice, before anything is loaded.

    Args:
        name: one of `ENGINES`.
        attn: what was given as attention implementation.
        processes: what was given as number of processes.

    Returns:
        The number of processes; None for the default.

    Raises:
        UserError: the engine is unknown or not installed, or an option does not go with it.
    """
    if name not in ENGINES:
        raise UserError(f"--engine is '{name}'; choose one of {', '.join(ENGINES)}.")
    if name == "transformers":
        return processes
    if attn is not None:
        raise UserError("--attn is an attention implementation of transformers; leave it out with --engine vllm.")
    if processes is not None and processes > 1:
        raise UserError("--engine vllm answers many questions at once in one process; leave --processes out.")
    found = find_spec("vllm")
    if found is None or found.origin is None:  # a folder of this name is no package
        raise UserError(
            "--engine vllm: vLLM is not installed here. It has an environment of its own: 'bash scripts/vllm_env.sh' "
            "makes one for CPUs, with a GPU install 'llava-skip[vllm]' into a new one; then run this there."
        )
    return 1


def engine_numerics(name: str, dtype: str | None, attn: str | None) -> "Numerics":
    """How models compute with an engine; slow, because its packages are imported. Errors as `numerics`."""
    if name == "vllm":
        from eval.answering.vllm import vllm_numerics

        return vllm_numerics(dtype)
    from eval.answering.generate import numerics

    return numerics(dtype, attn)
