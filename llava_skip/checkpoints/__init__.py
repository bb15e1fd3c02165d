"""Checkpoints in every layout that people have, read into the one model; and written for transformers' LLaVA."""

from llava_skip.checkpoints.export import export_llava_hf
from llava_skip.checkpoints.files import find_folder, load_tokenizer
from llava_skip.checkpoints.joining import build_from_parts, load_weights
from llava_skip.checkpoints.layouts import detect_layout
from llava_skip.checkpoints.loading import load_checkpoint
from llava_skip.checkpoints.names import native_name, native_weights
from llava_skip.checkpoints.report import LoadReport

__all__ = [
    "LoadReport",
    "build_from_parts",
    "detect_layout",
    "export_llava_hf",
    "find_folder",
    "load_checkpoint",
    "load_tokenizer",
    "load_weights",
    "native_name",
    "native_weights",
]
