"""The benchmarks by name."""

from eval.benchmark import Benchmark
from eval.benchmarks.ai2d import AI2D
from eval.benchmarks.chartqa import ChartQA
from eval.benchmarks.docvqa import DocVQA
from eval.benchmarks.gqa import GQA
from eval.benchmarks.hallusionbench import HallusionBench
from eval.benchmarks.mathvista import MathVista
from eval.benchmarks.mmbench import MMBench
from eval.benchmarks.mme import MME
from eval.benchmarks.mmmu import MMMU
from eval.benchmarks.mmstar import MMStar
from eval.benchmarks.mmvet import MMVet
from eval.benchmarks.ocrbench import OCRBench
from eval.benchmarks.pope import POPE
from eval.benchmarks.scienceqa import ScienceQA
from eval.benchmarks.seedimage import SEEDImage
from eval.benchmarks.textvqa import TextVQA
from eval.benchmarks.vizwiz import VizWiz
from eval.benchmarks.vqav2 import VQAv2
from llava_skip_base.errors import UserError
from llava_skip_base.texts import shortened

BENCHMARKS: dict[str, type[Benchmark]] = {
    kind.name: kind
    for kind in (
        *(MMBench, MMVet, MMStar, MME, TextVQA, MMMU, MathVista, OCRBench, GQA, POPE),
        *(ScienceQA, SEEDImage, VizWiz, VQAv2, AI2D, ChartQA, DocVQA, HallusionBench),
    )
}


def get_benchmark(name: str, rule: str | None = None, protocol: str | None = None) -> Benchmark:
    """The benchmark of this name (case, hyphens and underscores do not matter), with a rule and a protocol of it.

    Raises:
        UserError: an unknown name; it lists the known ones.
    """
    kind = BENCHMARKS.get(name.lower().replace("-", "").replace("_", ""))
    if kind is None:
        raise UserError(f"unknown benchmark '{shortened(name)}'; choose one of {', '.join(BENCHMARKS)}.")
    return kind(rule, protocol)
