"""Checkpoints that are whole or not there, and runs that continue from them as if nothing had happened.

A checkpoint is written into a staging folder, described by a manifest, and takes its name `checkpoint-N` by one rename
when every process has written its part. Whatever kills the run, a folder of that name was whole once; the sizes in the
manifest show whether it still is.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json, write_json

MANIFEST = "checkpoint.json"
"""Describes a whole checkpoint; written last."""
STAGING = ".saving"
"""Folder in the run's folder where a checkpoint is put together."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


@dataclass
class Manifest:
    """What a checkpoint is made of.

    Args:
        step: optimizer steps done.
        world_size: processes that wrote it.
        zero_stage: DeepSpeed's ZeRO stage; None without DeepSpeed.
        progress: sums over the steps done that transformers does not keep, see `ResumableTrainer.progress`.
        files: path in the checkpoint -> bytes.
    """

    step: int
    world_size: int
    zero_stage: int | None
    progress: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, checkpoint: Path) -> Manifest:
        """The manifest of a checkpoint.

        Raises:
            MissingFileError: the checkpoint has none.
        """
        return cls(**read_json(checkpoint / MANIFEST))


def seal(folder: Path, manifest: Manifest) -> None:
    """Bring every file of a checkpoint to the disk, then write the manifest that says how long each must be."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        manifest.files[str(file.relative_to(folder))] = file.stat().st_size
    write_json(folder / MANIFEST, asdict(manifest), sort_keys=True)


def find_fault(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole, in words; None if it is."""
    try:
        manifest = Manifest.read(checkpoint)
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (TypeError, ValueError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    for name, size in manifest.files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    return None


def find_checkpoint(output: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and a message about everything newer that had to be passed over.

    Changes the folder so that what was passed over is neither continued from nor counted as a checkpoint: a checkpoint
    that was being written is deleted, a damaged one is renamed to `damaged-checkpoint-N`. One process calls this.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    messages = []
    if unfinished := sorted((output / STAGING).glob("*")):
        names = ", ".join(path.name for path in unfinished)
        messages.append(f"{names} was being written when the run ended: passed over and deleted.")
    shutil.rmtree(output / STAGING, ignore_errors=True)
    checkpoints = [Path(path) for path in reversed(sort_checkpoints(str(output)))]
    faults: dict[Path, str] = {}
    for checkpoint in checkpoints:
        fault = find_fault(checkpoint)
        if fault is None:
            for damaged, why in faults.items():
                messages.append(f"{damaged.name} is damaged ({why}): passed over, renamed to damaged-{damaged.name}.")
                damaged.rename(damaged.with_name(f"damaged-{damaged.name}"))
            return checkpoint, messages
        faults[checkpoint] = fault
    if faults:
        text = "; ".join(f"{path.name}: {fault}" for path, fault in faults.items())
        raise UserError(
            f"No checkpoint of OUTPUT {output} is whole ({text}): restore one, or delete them to begin anew."
        )
    return None, messages


def check_fits(checkpoint: Path, world_size: int, zero_stage: int | None) -> None:
    """Refuse a checkpoint that another number of processes, or another ZeRO stage, has cut into pieces.

    Raises:
        UserError: says what to do.
    """
    manifest = Manifest.read(checkpoint)
    was = (manifest.world_size, manifest.zero_stage)
    if was != (world_size, zero_stage):
        raise UserError(
            f"{checkpoint} was written by {_described(*was)}, and this run has {_described(world_size, zero_stage)}: "
            f"continue it as it was, or start another run from its weights (--model {checkpoint}, another OUTPUT)."
        )


def zero_stage(arguments: TrainingArguments) -> int | None:
    """DeepSpeed's ZeRO stage; None without DeepSpeed."""
    plugin = getattr(arguments, "deepspeed_plugin", None)
    return None if plugin is None else plugin.zero_stage


def _described(world_size: int, zero_stage: int | None) -> str:
    processes = f"{world_size} process{'es' if world_size > 1 else ''}"
    return f"{processes} {'without DeepSpeed' if zero_stage is None else f'under ZeRO-{zero_stage}'}"


class ResumableTrainer(Trainer):
    """Trainer whose checkpoints are whole or not there, and whose sums go on where a checkpoint left them.

    Attributes:
        before: `progress()` of the checkpoint that this process started from; empty without one.
        continued_from_step: the step of that checkpoint; 0 without one.
        seconds_to_first_step: from the launch of this process to the end of its first step; None before it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_Continue(self))
        self.before: dict[str, Any] = {}
        self._began = time.perf_counter()
        self._ended: float | None = None
        self.continued_from_step = 0
        self.seconds_to_first_step: float | None = None

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """As Trainer's, from the beginning or from a checkpoint that `find_checkpoint` gave."""
        if resume_from_checkpoint:
            manifest = Manifest.read(Path(resume_from_checkpoint))
            self.before, self.continued_from_step = manifest.progress, manifest.step
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    # --- sums over the whole run, whatever interrupted it

    @property
    def seconds(self) -> float:
        """Seconds of training since the run began; what was done behind the last checkpoint and lost is not in them."""
        return self.before.get("seconds", 0.0) + (self._ended or time.perf_counter()) - self._began

    def progress(self) -> dict[str, Any]:
        """What transformers keeps in memory only: the loss since the last log entry, its sum so far, and the time.

        Every process calls it, after it has written its part of a checkpoint. A subclass may add sums of its own.
        """
        return {
            "loss": self.accelerator.reduce(self._tr_loss.double(), reduction="mean").item(),
            "loss_sum": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "seconds": self.seconds,
        }

    def continue_sums(self) -> None:
        """Take the sums up again; transformers has just set its own to zero."""
        self._began = time.perf_counter()
        if self.before:
            self._tr_loss += self.before["loss"]
            self._total_loss_scalar = self.before["loss_sum"]
            self._globalstep_last_logged = self.before["logged_step"]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers would do one step too many when it continues from a checkpoint of the last step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        self._ended = time.perf_counter()
        self._initial_global_step = 0  # its means are then those of the whole run, like the sums
        return super()._finalize_training(trial, num_train_samples, time.time() - self.seconds)

    # --- writing

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(super()._get_output_dir(trial), STAGING)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            manifest = Manifest(self.state.global_step, self.args.world_size, zero_stage(self.args), self.progress())
            if self.is_world_process_zero():  # the sums above have come from all: everyone has written its part
                self._put_in_place(name, manifest)
        except Exception as error:  # each of the libraries that write has an exception of its own for a full disk
            raise CheckpointError(self._saving_failed(name, error)) from error
        self.accelerator.wait_for_everyone()

    def _put_in_place(self, name: str, manifest: Manifest) -> None:
        output = Path(self.args.output_dir)
        staged = output / STAGING / name
        seal(staged, manifest)
        staged.rename(output / name)
        staged.parent.rmdir()
        rotate_checkpoints(str(output), self.args.save_total_limit)

    def _saving_failed(self, name: str, error: Exception) -> str:
        output = Path(self.args.output_dir)
        whole = sort_checkpoints(str(output))
        kept = f"{Path(whole[-1]).name} is whole and was kept" if whole else "there is no older one"
        free = shutil.disk_usage(output).free / 2**30
        return (
            f"rank {self.args.process_index} could not write {name} ({type(error).__name__}: {error}); {kept}. "
            f"{output} has {free:.2f} GiB free: make room, then the same command continues the run."
        )


class _Continue(TrainerCallback):
    """Tells the trainer when training begins, and when the first step is done."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.continue_sums()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self._trainer.seconds_to_first_step is None:
            launched = os.environ.get("LAUNCHED_AT") or psutil.Process().create_time()
            self._trainer.seconds_to_first_step = time.time() - float(launched)
