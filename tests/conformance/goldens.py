"""A folder of goldens: index.json with the sizes of each file, and safetensors files beside it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from llava_skip_base.errors import MissingFileError
from llava_skip_base.files import read_json

LOGITS = 1e-4
"""Tolerance of logits and other values, absolute."""
GRADIENTS = 1e-5
"""Tolerance of gradients, relative to the largest entry of the tensor."""
_SMALLEST_SCALE = 1e-3
"""Gradients that are zero up to rounding are measured against this instead of against themselves."""


@dataclass(frozen=True)
class Comparison:
    """One thing that was compared: the largest error and how large it may be (0 for choices: they are exact)."""

    what: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


def close(what: str, actual: Tensor, golden: Tensor, tolerance: float = LOGITS) -> Comparison:
    """Largest absolute difference; infinite if the shapes differ."""
    if actual.shape != golden.shape:
        return Comparison(
            f"{what} of shape {tuple(actual.shape)} against {tuple(golden.shape)}", float("inf"), tolerance
        )
    difference = (actual.detach().double() - golden.double()).abs()
    return Comparison(what, difference.max().item() if difference.numel() else 0.0, tolerance)


def close_gradient(what: str, actual: Tensor | None, golden: Tensor) -> Comparison:
    """Largest difference relative to the golden's largest entry; infinite if there is no gradient."""
    if actual is None:
        return Comparison(f"{what} (no gradient)", float("inf"), GRADIENTS)
    absolute = close(what, actual.reshape(golden.shape), golden)
    scale = max(golden.abs().max().item(), _SMALLEST_SCALE)
    return Comparison(what, absolute.error / scale, GRADIENTS)


def same(what: str, actual: Tensor, golden: Tensor) -> Comparison:
    """Number of entries that differ; choices have no tolerance."""
    if actual.shape != golden.shape:
        return close(what, actual, golden, 0.0)
    return Comparison(what, float((actual.long() != golden.long()).sum().item()), 0.0)


class Golden:
    """One file of the folder: its entry in the index and its tensors (float32 and integers)."""

    def __init__(self, folder: GoldenFolder, name: str, entry: dict[str, Any]) -> None:
        self.folder, self.name, self.entry = folder, name, entry

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors; what is stored as bfloat16 is exact in it and computed in float32."""
        path = self.folder.path / f"{self.name}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is named in index.json, but is not there.")
        return {
            name: tensor.float() if tensor.is_floating_point() else tensor.long()
            for name, tensor in load_file(path).items()
        }

    def names(self) -> set[str]:
        """Names of the tensors, from the index alone."""
        return set(self.entry.get("tensors", ()))

    def cases(self) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
        """Case name -> (its entry, its tensors without the case's prefix)."""
        return {
            case: (entry, {n.removeprefix(f"{case}."): t for n, t in self.tensors.items() if n.startswith(f"{case}.")})
            for case, entry in self.entry["cases"].items()
        }


class GoldenFolder:
    """A folder laid out like the project's goldens.

    Raises:
        MissingFileError: it has no index.json.
    """

    def __init__(self, path: Path) -> None:
        index = path / "index.json"
        if not index.is_file():
            raise MissingFileError(f"{index} does not exist: give a folder with an index.json and safetensors files.")
        self.path = path
        self.files = {name: Golden(self, name, entry) for name, entry in read_json(index).items()}

    @cached_property
    def tables(self) -> dict[str, Any]:
        """The JSON files beside the index, by file name."""
        files = sorted(self.path.glob("*.json"))
        return {f.name: read_json(f) for f in files if f.name != "index.json"}

    def unindexed(self) -> list[str]:
        """Files of the folder that the index does not name and that nothing here can read."""
        known = {"index.json", "README.md", *self.tables} | {f"{name}.safetensors" for name in self.files}
        return sorted(entry.name for entry in self.path.iterdir() if entry.name not in known)

    def weights_for(self, golden: Golden, marker: str, field: str) -> dict[str, Tensor]:
        """The weights that a file runs with: of the files that hold `marker` and share its `field`, the nearest name.

        Args:
            golden: the file.
            marker: a tensor name that tells the kind of weights.
            field: an entry of the index that must be equal (`config` or `clip`).

        Raises:
            ValueError: no file fits.
        """
        fitting = [
            file
            for file in self.files.values()
            if marker in file.names() and "logits" not in file.names() and file.entry.get(field) == golden.entry[field]
        ]
        if not fitting:
            raise ValueError(f"{golden.name}: no file of the folder holds {marker} with the same {field}.")
        note = golden.entry.get("note_weights", "")
        return max(fitting, key=lambda file: (file.name in note, _common_prefix(file.name, golden.name))).tensors

    def resampler_for(self, golden: Golden) -> Golden:
        """The file with the resampler whose features are of the same width as a file's.

        Raises:
            ValueError: no file fits.
        """
        level = next(name for name in sorted(golden.names()) if name.startswith("feat."))
        width = golden.tensors[level].shape[-1]
        note = golden.entry.get("note_weights", "")
        fitting = [f for f in self.files.values() if f.entry.get("context_dim") == width and "window_sizes" in f.entry]
        if not fitting:
            raise ValueError(f"{golden.name}: no file of the folder holds a resampler for features of width {width}.")
        return max(fitting, key=lambda file: file.name in note)


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def gradient_names(tensors: dict[str, Tensor]) -> list[str]:
    """The parameters whose gradients a file holds, without the `grad.` in front."""
    return [
        name.removeprefix("grad.") for name in tensors if name.startswith("grad.") and name != "grad.image_features"
    ]
