"""The benchmarks by name."""

from eval.benchmarks.base import Benchmark
from eval.benchmarks.mmbench import MMBench
from eval.benchmarks.mmstar import MMStar
from eval.benchmarks.mmvet import MMVet
from eval.errors import EvalError

BENCHMARKS: dict[str, type[Benchmark]] = {kind.name: kind for kind in (MMBench, MMStar, MMVet)}


def get_benchmark(name: str) -> Benchmark:
    """Make the benchmark of this exact name.

    Args:
        name: a key of ``BENCHMARKS``.

    Raises:
        EvalError: listing the names there are.
    """
    if name not in BENCHMARKS:
        raise EvalError(f"unknown benchmark '{name}'; choose one of {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]()
