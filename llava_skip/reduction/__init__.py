"""Rival methods: fewer tokens of an image for the language model; each is one file and one line here."""

from llava_skip.reduction.config import ReductionConfig
from llava_skip.reduction.method import (
    LayerRows,
    Option,
    Reduction,
    Selection,
    get_reduction,
    reduction_names,
    register_reduction,
)
from llava_skip.reduction.random_rows import RandomRows

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

for _reduction in (RandomRows(),):
    register_reduction(_reduction)
