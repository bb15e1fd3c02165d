"""A run ends when its loss, gradient or weights are no longer finite, before they displace what was good.

A device is never asked for a number alone. The norm of the gradient, which clipping computes anyway, is copied while
the device works on, and read together with the loss of the next micro batch. Weights are looked at when they are saved.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import sort_checkpoints

from llava_skip_base.errors import UserError, first_few
from llava_skip_base.files import write_json
from train.resilience.resume import MANIFEST

MOST_SKIPPED = 15
"""Steps one after the other that --fp16 may leave out while it looks for a scale of the loss: from 65,536 down to 2."""
_ADVICE = "Look at these, lower the learning rate, or use --bf16 true instead of --fp16."


class NotFinite(UserError):
    """A loss, a gradient or a weight is NaN or infinite, and all further updates would be useless.

    Attributes:
        of_all_ranks: every rank raises it at the same place.
    """

    def __init__(self, message: str, of_all_ranks: bool) -> None:
        super().__init__(message)
        self.of_all_ranks = of_all_ranks


class FiniteChecks:
    """The checks of a trainer.

    Attributes:
        records: names of the records of the step that is being made, on this rank.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._loss: _Copy | None = None
        self._batch: list[Any] = []
        self._norm: _Copy | None = None
        self._norm_of: tuple[int, list[Any]] = (0, [])
        self._skipped = 0
        self.records: list[Any] = []

    def note_loss(self, loss: Tensor, records: list[Any]) -> None:
        """Start to copy the loss of a micro batch, whose records are named."""
        self._loss = _Copy(loss)
        self._batch = records
        self.records = [*self.records, *records]

    def check_loss(self) -> None:
        """Check the loss that was noted last, and the gradient of the step before. The backward pass is queued by now.

        Raises:
            NotFinite: `nonfinite_loss.rank<N>.json` in the run's folder has the records.
        """
        assert self._loss is not None
        loss = self._loss.read()
        self.check_norm()
        if math.isfinite(loss):
            return
        step = self._trainer.state.global_step + 1
        path = self._write("loss", step, self._batch, loss=str(loss))
        raise NotFinite(
            f"the loss of step {step} is {loss} on rank {self._trainer.args.process_index}; {path} has the ids of its "
            f"records. {_ADVICE}",
            of_all_ranks=False,
        )

    def note_norm(self, norm: Tensor | float | None) -> None:
        """Note the norm of a step's gradient; it is checked now if reading it costs nothing, else with the next loss.

        Args:
            norm: before clipping, over all ranks; None if DeepSpeed was told not to compute it.

        Raises:
            NotFinite: as `check_norm`.
        """
        self._norm_of = (self._trainer.state.global_step + 1, self.records)
        self.records = []
        if norm is not None:
            self._norm = _Copy(torch.as_tensor(norm))
            if self._norm.is_there:
                self.check_norm()

    def check_norm(self) -> None:
        """Check the norm that was noted last. Every rank has the same one.

        --fp16 looks for a scale of the loss by leaving out steps whose gradient is not finite; only many of them, one
        after the other, are an error.

        Raises:
            NotFinite: `nonfinite_gradient.rank<N>.json` in the run's folder has the records.
        """
        if self._norm is None:
            return
        norm, self._norm = self._norm.read(), None
        if 0 <= norm < math.inf:  # DeepSpeed had -1 for a sum that is not finite
            self._skipped = 0
            return
        self._skipped += 1
        if self._trainer.args.fp16 and self._skipped < MOST_SKIPPED:
            return
        step, records = self._norm_of
        names = [name for name, bad in _faults(self._trainer.model, gradients=True) if bad]
        names = names or [name for name, bad in _faults(self._trainer.model) if bad]
        path = self._write("gradient", step, records, norm=str(norm), tensors=names)
        said = f": {first_few(names)}" if names else ""
        repeated = f", like those of the {self._skipped - 1} steps before it," if self._trainer.args.fp16 else ""
        raise NotFinite(
            f"the gradient of step {step}{repeated} is not finite{said} (norm {norm}); {path} has the ids of the "
            f"step's records. {_ADVICE} {self._kept()}",
            of_all_ranks=True,
        )

    def check_weights(self) -> None:
        """Check the trained weights, before they are saved. Every rank calls it, and looks at its own part of them.

        Raises:
            NotFinite: `nonfinite_weights.rank<N>.json` in the run's folder has the tensors and the last step's records.
        """
        self.check_norm()
        found = _faults(self._trainer.model)
        if not found:
            return
        flags = torch.tensor([float(bad) for _, bad in found], device=self._trainer.args.device)
        flags = self._trainer.accelerator.reduce(flags, reduction="sum")
        names = [name for (name, _), bad in zip(found, flags.tolist(), strict=True) if bad]
        if not names:
            return
        step, (_, records) = self._trainer.state.global_step, self._norm_of
        path = self._write("weights", step, records, tensors=names)
        raise NotFinite(
            f"step {step} left weights that are not finite, of {len(found)} trained tensors {first_few(names)}; {path} "
            f"has all, and the ids of the step's records. They are not saved. {_ADVICE} {self._kept()}",
            of_all_ranks=True,
        )

    def _kept(self) -> str:
        """What is left of the run, in words."""
        output = str(self._trainer.args.output_dir)
        whole = [path for path in map(Path, sort_checkpoints(output)) if (path / MANIFEST).is_file()]
        if not whole:
            return "There is no earlier checkpoint."
        return f"{whole[-1]} was kept: --model {whole[-1]}, and another OUTPUT, start from its weights."

    def _write(self, what: str, step: int, records: list[Any], **found: Any) -> Path:
        """Write what was found, and where; the file."""
        rank, optimizer = self._trainer.args.process_index, self._trainer.optimizer
        path = Path(self._trainer.args.output_dir) / f"nonfinite_{what}.rank{rank}.json"
        rate = optimizer.param_groups[0]["lr"] if optimizer is not None else None
        write_json(
            path, found | {"step": step, "rank": rank, "learning_rate": rate, "record_ids": records}, sort_keys=True
        )
        return path


class _Copy:
    """A number that is on its way from a device.

    Attributes:
        is_there: reading it waits for nothing.
    """

    def __init__(self, number: Tensor) -> None:
        self._copy, self._copied = number.detach().to("cpu", non_blocking=True), None
        self.is_there = number.device.type != "cuda"
        if not self.is_there:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> float:
        """The number, when it has arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy.item()


@torch.no_grad()
def _faults(model: nn.Module, gradients: bool = False) -> list[tuple[str, bool]]:
    """Name of each trained parameter, and whether what this rank has of it, or of its gradient, is not finite."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.grad if gradients else getattr(parameter, "ds_tensor", parameter)  # its part under ZeRO-3
        if parameter.requires_grad and tensor is not None:
            found[name] = _extremes(tensor).to(parameter.device, non_blocking=True)
    finite = torch.stack(list(found.values())).isfinite().all(dim=1).tolist() if found else []
    return [(name, not fine) for name, fine in zip(found, finite, strict=True)]


def _extremes(tensor: Tensor) -> Tensor:
    """[2] the smallest and the largest element, or NaN if there is one; no copy of the tensor is made."""
    if not tensor.numel():  # a part under ZeRO-3 may be empty
        return torch.zeros(2, device=tensor.device)
    return torch.stack(torch.aminmax(tensor)).float()
