"""Read checkpoints of all known layouts into the one model, and write them for transformers' LLaVA."""

from llava_skip.checkpoints.export import export_llava_hf
from llava_skip.checkpoints.files import find_folder
from llava_skip.checkpoints.layouts import detect_layout
from llava_skip.checkpoints.loading import load_checkpoint, load_weights
from llava_skip.checkpoints.names import native_name, native_weights
from llava_skip.checkpoints.report import LoadReport
from llava_skip.checkpoints.sources import load_config, padded_vocabulary
from llava_skip.checkpoints.tokenizer import has_tokenizer, load_tokenizer

__all__ = [
    "LoadReport",
    "detect_layout",
    "export_llava_hf",
    "find_folder",
    "has_tokenizer",
    "load_checkpoint",
    "load_config",
    "load_tokenizer",
    "load_weights",
    "native_name",
    "native_weights",
    "padded_vocabulary",
]
