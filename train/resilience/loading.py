"""Reads what a checkpoint holds without running code: a pickle from a stranger can name any function of this machine.

DeepSpeed opens its files as free pickles. Two things stand before that: `check_states` reads which classes and
functions the files name, without making them, and `only_data` makes `torch.load` refuse all others, whoever calls it.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llava_skip_base.errors import UserError
from llava_skip_base.texts import one_line

DEEPSPEED = {
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}
"""Module -> its classes that states of an optimizer under ZeRO hold: numbers with names."""
NUMPY = (
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
)
"""What the state of numpy's random numbers is made of."""
_FORCE, _FREE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""Variables with which `torch.load` makes tensors and plain data alone, or anything, whatever its caller asks for."""
_ENDINGS = (".pt", ".pth")


def check_states(checkpoint: Path) -> None:
    """Refuse a checkpoint whose states name classes or functions that no run writes; nothing of them is made.

    Raises:
        UserError: names the file and what it holds.
    """
    known = {*NUMPY, *(f"{module}.{name}" for module, names in DEEPSPEED.items() for name in names)}
    for file in sorted(path for path in checkpoint.rglob("*") if path.suffix in _ENDINGS and path.is_file()):
        try:
            named = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - known
        except (ValueError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise UserError(_refused(file, f"is not what torch.save writes ({_first_line(error)})")) from error
        if foreign := sorted(name for name in named if not name.startswith("numpy.dtypes.")):
            raise UserError(_refused(file, f"names {', '.join(foreign[:4])}, which no run saves"))


def _refused(file: Path, why: str) -> str:
    return (
        f"{file} {why}: it may run commands when it is opened, so it is not. Continue a run of your own, or start "
        "another one from the weights alone (--model with this folder, another OUTPUT)."
    )


def _first_line(error: Exception) -> str:
    return (one_line(error, 1) or type(error).__name__)[:200]


@contextmanager
def only_data(deepspeed: bool) -> Iterator[None]:
    """Inside, `torch.load` makes tensors, plain data, with `deepspeed` the classes of `DEEPSPEED`, and nothing else.

    Raises:
        UserError: a file held something else.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FREE)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_classes() if deepspeed else []):
            yield
    except pickle.UnpicklingError as error:
        raise UserError(f"a state of the checkpoint cannot be read as data: {_first_line(error)}") from error
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler  # takes seconds
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
