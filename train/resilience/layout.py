"""How the samples of a step are divided, and how another number of processes takes the same samples a step."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json
from train.resilience.checkpoint import MANIFEST, Manifest

RECORD = "run.json"
"""File in a run's folder with its arguments, and the layout that it began with."""


@dataclass(frozen=True)
class Layout:
    """The division of a step's samples.

    Attributes:
        processes: of the run.
        batch: samples of a process that are computed at once.
        accumulation: batches of a process in a step.
    """

    processes: int
    batch: int
    accumulation: int

    def __str__(self) -> str:
        return f"{described(self.processes)} x {self.batch} samples x {self.accumulation} accumulated"

    @property
    def samples(self) -> int:
        """Samples of a step."""
        return self.round * self.accumulation

    @property
    def round(self) -> int:
        """Samples that all processes compute at once; the end of an epoch is filled up to a multiple of it."""
        return self.processes * self.batch

    def on(self, processes: int, same_batches: bool = False) -> Layout | None:
        """The same samples a step on another number of processes; None if that number does not fit.

        Args:
            processes: of the restart.
            same_batches: whether the loss depends on what a batch is, as LLaVA's mean of means does, or a batch is
                chosen as a whole.
        """
        if same_batches:
            fits = self.processes % processes == 0
            return Layout(processes, self.batch, self.samples // processes // self.batch) if fits else None
        sizes = [size for size in range(self.batch, 0, -1) if self.samples % (processes * size) == 0]
        even = [size for size in sizes if self.round % (processes * size) == 0]  # also the last step of an epoch
        if not sizes:
            return None
        size = (even or sizes)[0]
        return Layout(processes, size, self.samples // processes // size)

    def fitting(self, same_batches: bool = False) -> list[int]:
        """The numbers of processes that can take the same samples a step."""
        return [number for number in range(1, self.samples + 1) if self.on(number, same_batches)]


def described(processes: int) -> str:
    """A number of processes, in words."""
    return f"{processes} process{'es' if processes > 1 else ''}"


def read_record(output: Path) -> dict[str, dict[str, Any]] | None:
    """The arguments of the run that a folder holds; None without one.

    Raises:
        UserError: the file is damaged.
    """
    file = output / RECORD
    if not file.is_file():
        return None
    record = read_json(file)
    groups = ("model", "data", "training")
    if not isinstance(record, dict) or not all(isinstance(record.get(group), dict) for group in groups):
        raise UserError(f"{file} does not hold the arguments of a run: restore it, or give another OUTPUT.")
    return record


def begun_with(output: Path, processes: int) -> Layout | None:
    """The layout with which the run of a folder began; None if it holds none.

    Folders of earlier versions do not say it; their checkpoints have the number of processes, which never changed.

    Args:
        output: the folder.
        processes: of now, for a folder that does not say it.

    Raises:
        UserError: a file is damaged.
    """
    if (record := read_record(output)) is None:
        return None
    training, layout = record["training"], record.get("layout")
    if layout is None:
        manifests = sorted(output.glob(f"checkpoint-*/{MANIFEST}"))
        layout = {
            "processes": Manifest.read(manifests[0].parent).world_size if manifests else processes,
            "batch": training.get("per_device_train_batch_size"),
            "accumulation": training.get("gradient_accumulation_steps"),
        }
    right = isinstance(layout, dict) and layout.keys() == {entry.name for entry in fields(Layout)}
    if not right or not all(isinstance(value, int) and value > 0 for value in layout.values()):
        raise UserError(f"{output / RECORD} does not say how a step was divided: restore it, or give another OUTPUT.")
    return Layout(**layout)


def continued(begun: Layout, own: Layout, same_batches: bool, output: Path) -> Layout:
    """The layout under which a run takes the samples that it began with.

    Args:
        begun: of the run.
        own: what the command line and the number of processes say.
        same_batches: see `Layout.on`.
        output: the run's folder.

    Raises:
        UserError: another number of samples a step, or a number of processes that does not fit.
    """
    if own.samples == begun.samples and (own.batch == begun.batch or not same_batches):
        if not same_batches or begun.round % own.round == 0:
            return own
    elif own.processes == begun.processes:
        raise UserError(
            f"OUTPUT {output} holds another run ({begun.samples} samples a step: {begun}; now {own.samples}: {own}): "
            "give another OUTPUT, the same arguments to continue it, or --overwrite true to delete it."
        )
    elif (own.batch, own.accumulation) == (begun.batch, begun.accumulation):
        if (layout := begun.on(own.processes, same_batches)) is not None:
            return layout
    numbers = ", ".join(map(str, begun.fitting(same_batches)))
    why = (
        " in batches as they were (--loss_normalization micro_batch, or --max_tokens_per_batch)" if same_batches else ""
    )
    raise UserError(
        f"OUTPUT {output} holds a run of {begun.samples} samples a step ({begun}), and {own} do not make the "
        f"same{why}: continue with {numbers} processes, and leave out the arguments about batches or give those of "
        "the run."
    )
