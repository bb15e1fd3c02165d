"""A folder of goldens: index.json with the sizes of each file, and the safetensors files."""

from __future__ import annotations

import re
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
SMALLEST_SHARE = 0.1
"""Smaller gradients are measured against this share of the file's largest one: some are zero up to rounding."""


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


def close_gradient(what: str, actual: Tensor | None, golden: Tensor, whole: float = 0.0) -> Comparison:
    """Largest difference relative to the golden's largest entry; infinite if there is no gradient.

    Args:
        what: for the report.
        actual: the gradient.
        golden: the gradient that is right.
        whole: the largest entry of all gradients of the same loss.
    """
    if actual is None:
        return Comparison(f"{what} (no gradient)", float("inf"), GRADIENTS)
    absolute = close(what, actual.reshape(golden.shape) if actual.numel() == golden.numel() else actual, golden)
    scale = max(golden.abs().max().item(), SMALLEST_SHARE * whole)
    return Comparison(absolute.what, absolute.error / scale if scale else absolute.error, GRADIENTS)


def same(what: str, actual: Tensor, golden: Tensor) -> Comparison:
    """Number of entries that differ; choices have no tolerance."""
    if actual.shape != golden.shape:
        return close(what, actual, golden, 0.0)
    return Comparison(what, float((actual.long() != golden.long()).sum().item()), 0.0)


RESAMPLER_QUERIES = ("weight.cls_token_", "model.mm_projector.cls_token_")
"""How the names of a resampler's queries begin, in a file of it alone and in one of a model."""


class Golden:
    """One file of the folder: its entry in the index and its tensors (float32 and integers)."""

    def __init__(self, folder: GoldenFolder, name: str, entry: dict[str, Any]) -> None:
        self.folder, self.name, self.entry = folder, name, entry

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors; bfloat16 is converted to float32, which is exact."""
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

    @property
    def named(self) -> set[str]:
        """The words of `note_weights`, which names the files of the weights."""
        return set(re.findall(r"[\w.-]+", self.entry.get("note_weights", "")))

    @property
    def is_resampler(self) -> bool:
        """Whether it holds the weights of a resampler."""
        return any(name.startswith(RESAMPLER_QUERIES) for name in self.names()) and "logits" not in self.names()

    @property
    def resampler(self) -> dict[str, Any]:
        """The sizes of a resampler: of the file, or of the table `cos`, in its entry, in that of a run, or apart."""
        if "window_sizes" in self.entry:
            return self.entry
        runs = (file.entry for file in self.folder.files.values() if self.name in file.named)
        table = next((e["cos"] for e in (self.entry, *runs, self.folder.sizes) if "cos" in e), None)
        if table is None:
            raise ValueError(f"{self.name}: the index has no table `cos` with the sizes of the resampler.")
        shapes = {
            name.rsplit(".", 2)[-2]: shape for name, (shape, _) in self.entry["tensors"].items() if "weight" in name
        }
        widths = {"llm_dim": shapes["out_proj"][0], "out_dim": shapes["out_proj"][1], "context_dim": shapes["to_kv"][1]}
        return widths | {"tokens_per_side": max(table["window_sizes"])} | table

    def cases(self) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
        """Case name -> (its entry, its tensors without the case's prefix)."""
        return {
            case: (entry, {n.removeprefix(f"{case}."): t for n, t in self.tensors.items() if n.startswith(f"{case}.")})
            for case, entry in self.entry["cases"].items()
        }


class GoldenFolder:
    """A folder laid out like the project's goldens.

    Attributes:
        files: of the entries of the index that list tensors.
        sizes: the other entries, sizes that several files share.

    Raises:
        MissingFileError: it has no index.json.
    """

    def __init__(self, path: Path) -> None:
        index = path / "index.json"
        if not index.is_file():
            raise MissingFileError(f"{index} does not exist: give a folder with an index.json and safetensors files.")
        self.path = path
        entries = read_json(index)
        self.files = {name: Golden(self, name, entry) for name, entry in entries.items() if "tensors" in entry}
        self.sizes = {name: entry for name, entry in entries.items() if name not in self.files}

    @cached_property
    def tables(self) -> dict[str, Any]:
        """The JSON files of the folder except the index, by file name."""
        files = sorted(self.path.glob("*.json"))
        return {f.name: read_json(f) for f in files if f.name != "index.json"}

    def unindexed(self) -> list[str]:
        """Files of the folder that are not in the index and that no check reads."""
        known = {"index.json", "README.md", *self.tables} | {f"{name}.safetensors" for name in self.files}
        return sorted(entry.name for entry in self.path.iterdir() if entry.name not in known)

    def weights_for(self, golden: Golden, marker: str, field: str) -> dict[str, Tensor]:
        """The weights that a file runs with: of the files with `marker` and an equal `field`, the most similar name.

        Args:
            golden: the file.
            marker: a tensor name that identifies the kind of weights.
            field: an entry of the index that must be equal (`config` or `clip`).

        Raises:
            ValueError: no file fits.
        """
        fitting = [
            file
            for file in self.files.values()
            if marker in file.names()
            and "logits" not in file.names()
            and (file.entry.get(field) == golden.entry.get(field) or file.name in golden.named)
        ]
        if not fitting:
            raise ValueError(f"{golden.name}: no file of the folder holds {marker} with the same {field}.")
        return max(
            fitting, key=lambda file: (file.name in golden.named, _common_prefix(file.name, golden.name))
        ).tensors

    def resampler_for(self, golden: Golden) -> Golden:
        """The file of the resampler for features of the same width as in `golden`.

        Raises:
            ValueError: no file fits.
        """
        level = next(name for name in sorted(golden.names()) if name.startswith("feat."))
        width = golden.tensors[level].shape[-1]
        fitting = [f for f in self.files.values() if f.is_resampler and f.resampler["context_dim"] == width]
        if not fitting:
            raise ValueError(f"{golden.name}: no file of the folder holds a resampler for features of width {width}.")
        return max(fitting, key=lambda file: file.name in golden.named)


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def gradient_names(tensors: dict[str, Tensor]) -> list[str]:
    """The parameters whose gradients a file holds, without the prefix `grad.`."""
    return [
        name.removeprefix("grad.") for name in tensors if name.startswith("grad.") and name != "grad.image_features"
    ]


def largest_gradient(tensors: dict[str, Tensor]) -> float:
    """The largest entry of all gradients that a file holds."""
    return max((tensor.abs().max().item() for name, tensor in tensors.items() if name.startswith("grad.")), default=0.0)
