"""Loads a saved model for its users: folder and settings are checked before the weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_skip.checkpoints import find_folder
from llava_skip.checkpoints.files import is_adapter
from llava_skip.checkpoints.loading import check_native
from llava_skip.checkpoints.processor import load_processor
from llava_skip.checkpoints.schema import read_config
from llava_skip.configuration import LlavaSkipConfig
from llava_skip.ends import Ends, ends_of
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip.number_formats import dtype_name
from llava_skip_base.errors import UserError


@dataclass(frozen=True)
class Loaded:
    """A model that answers.

    Attributes:
        folder: where it is from.
        model: on its device.
        processor: with a chat template.
        ends: the ends of an answer, at which the model's `generate` stops.
    """

    folder: Path
    model: LlavaSkipForConditionalGeneration
    processor: Any
    ends: Ends

    @classmethod
    def of(cls, folder: Path, model: LlavaSkipForConditionalGeneration, processor: Any) -> Loaded:
        """One around a model on its device, and its processor."""
        ends = ends_of(processor).with_strings(model.generation_config.stop_strings)
        ends.save_in(model.generation_config)
        return cls(folder, model.eval(), processor, ends)


def choose_device(name: str | None) -> torch.device:
    """The device of a name such as `cuda:1` or `cpu`; the first GPU, else the CPU, without one.

    Raises:
        UserError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # of torch builds without it
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used ({reason}): give cpu, cuda or cuda:1.") from error
    if device.type == "meta":
        raise UserError("--device meta computes nothing: give cpu, cuda or cuda:1.")
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The number format of a name, or that of the device without one; errors as `dtype_name`."""
    return getattr(torch, dtype_name(name, device.type))


@dataclass(frozen=True)
class Found:
    """A saved model whose weights are not read yet."""

    folder: Path
    config: LlavaSkipConfig
    processor: Any

    def load(self, device: torch.device, dtype: torch.dtype) -> Loaded:
        """Read the weights."""
        model = LlavaSkipForConditionalGeneration.from_pretrained(self.folder, config=self.config, dtype=dtype)
        return Loaded.of(self.folder, model.to(device), self.processor)


def find(source: str) -> Found:
    """The model of a folder or a hub name, with all that can be checked before its weights are read.

    Raises:
        UserError: it is no model of the library, has no chat template, or a file of it is broken.
    """
    folder = find_folder(source)
    if is_adapter(folder):
        raise UserError(f"{source} is a LoRA adapter; merge it: llava-skip merge-lora {source} --output MERGED.")
    kind = read_config(folder).get("model_type")
    if kind != LlavaSkipConfig.model_type:
        raise UserError(
            f"{source} holds a model of the type {kind!r}, not one of the library; convert it: llava-skip convert "
            f"{source} OUTPUT."
        )
    config = check_native(folder)
    processor = load_processor(folder)
    if not getattr(processor, "chat_template", None):
        raise UserError(
            f"{source}: its processor has no chat template; save it with the one it was trained on (llava-skip "
            "convert SOURCE OUTPUT --template NAME does)."
        )
    return Found(folder, config, processor)


def load(source: str, device: torch.device, dtype: torch.dtype) -> Loaded:
    """The model of a folder or a hub name; errors as `find`."""
    return find(source).load(device, dtype)
