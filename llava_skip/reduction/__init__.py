"""Rival methods: fewer tokens of an image for the language model; each is one file and one line here."""

from llava_skip.reduction.config import ReductionConfig
from llava_skip.reduction.divprune import DivPrune
from llava_skip.reduction.downsample import Downsample
from llava_skip.reduction.fastervlm import FasterVlm
from llava_skip.reduction.fastv import FastV
from llava_skip.reduction.grid import Grid
from llava_skip.reduction.hiprune import HiPrune
from llava_skip.reduction.method import (
    LayerRows,
    Option,
    Reduction,
    Selection,
    get_reduction,
    reduction_names,
    register_reduction,
)
from llava_skip.reduction.prumerge import PruMergePlus
from llava_skip.reduction.pyramiddrop import PyramidDrop
from llava_skip.reduction.random_rows import RandomRows
from llava_skip.reduction.shortv import ShortV
from llava_skip.reduction.sparsevlm import SparseVLM
from llava_skip.reduction.visionzip import VisionZip
from llava_skip.reduction.vispruner import VisPruner

__all__ = [
    "LayerRows",
    "Option",
    "Reduction",
    "ReductionConfig",
    "Selection",
    "get_reduction",
    "reduction_names",
    "register_reduction",
]

register_reduction(RandomRows())
register_reduction(Grid())
register_reduction(Downsample())
register_reduction(FasterVlm())
register_reduction(VisionZip())
register_reduction(VisPruner())
register_reduction(HiPrune())
register_reduction(DivPrune())
register_reduction(PruMergePlus())
register_reduction(FastV())
register_reduction(PyramidDrop())
register_reduction(SparseVLM())
register_reduction(ShortV())
