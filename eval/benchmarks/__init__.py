"""The benchmarks by name."""

from eval.benchmark import Benchmark
from eval.benchmarks.gqa import GQA
from eval.benchmarks.mathvista import MathVista
from eval.benchmarks.mmbench import MMBench
from eval.benchmarks.mme import MME
from eval.benchmarks.mmmu import MMMU
from eval.benchmarks.mmstar import MMStar
from eval.benchmarks.mmvet import MMVet
from eval.benchmarks.ocrbench import OCRBench
from eval.benchmarks.pope import POPE
from eval.benchmarks.textvqa import TextVQA
from eval.errors import EvalError

BENCHMARKS: dict[str, type[Benchmark]] = {
    kind.name: kind for kind in (MMBench, MMVet, MMStar, MME, TextVQA, MMMU, MathVista, OCRBench, GQA, POPE)
}


def get_benchmark(name: str, rule: str | None = None, protocol: str | None = None) -> Benchmark:
    """Make the benchmark of this name; case, hyphens and underscores do not matter.

    Args:
        name: a key of ``BENCHMARKS``.
        rule: how to score; the benchmark's default where None.
        protocol: how to ask; the benchmark's default where None.

    Raises:
        EvalError: listing the names there are.
    """
    kind = BENCHMARKS.get(name.lower().replace("-", "").replace("_", ""))
    if kind is None:
        raise EvalError(f"unknown benchmark '{name}'; choose one of {', '.join(BENCHMARKS)}.")
    return kind(rule, protocol)
