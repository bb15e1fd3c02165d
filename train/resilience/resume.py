"""Runs that continue from their checkpoints with the same losses and weights."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput, rotate_checkpoints, sort_checkpoints, speed_metrics

from llava_skip_base.errors import UserError
from llava_skip_base.files import write_text
from train.resilience.checkpoint import MANIFEST, UNFINISHED, Manifest, flush, seal
from train.resilience.loading import only_data
from train.resilience.restart import finish, is_redivided, read_universal, zero_stage


class CheckpointError(UserError):
    """A checkpoint could not be written."""


class ResumableTrainer(Trainer):
    """Trainer whose checkpoints are whole or do not count, and whose sums continue from those of a checkpoint.

    Attributes:
        before: `progress()` of the checkpoint that this process started from; empty without one.
        continued_from_step: the step of that checkpoint; 0 without one.
        seconds_to_first_step: from the launch of this process to the end of its first step; None before it.
    """

    def __init__(self, *args: Any, callbacks: Sequence[TrainerCallback] = (), **kwargs: Any) -> None:
        super().__init__(*args, callbacks=[_Events(self), *callbacks], **kwargs)
        # Trainer would delete older checkpoints before the new one has its manifest.
        self._kept_checkpoints, self.args.save_total_limit = self.args.save_total_limit, None
        self.before: dict[str, Any] = {}
        self.continued_from_step = 0
        self.seconds_to_first_step: float | None = None
        self._began = time.perf_counter()
        self._new_loss = torch.tensor(0.0, device=self.args.device)
        """Sum of the losses since the last log entry, on this process."""
        self._logged_loss = 0.0
        """Sum of the losses up to the last log entry, mean over the processes."""
        self._logged_step = 0
        self._redivided: Path | None = None
        """The checkpoint that this process started from, if other processes or another ZeRO stage have written it."""
        self._saving: str | None = None
        """Name of the checkpoint that is being written."""

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """As Trainer's, from the beginning or from a checkpoint that `find_checkpoint` gave.

        Raises:
            CheckpointError: a checkpoint could not be written.
            UserError: a state of the checkpoint is more than data.
        """
        if resume_from_checkpoint:
            manifest = Manifest.read(Path(resume_from_checkpoint))
            self.before, self.continued_from_step = manifest.progress, manifest.step
            if is_redivided(manifest, self.args):
                self._redivided = Path(resume_from_checkpoint)
                read_universal(self.args)
        try:
            with only_data(self.is_deepspeed_enabled):
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except (OSError, SafetensorError, RuntimeError) as error:  # a full disk: RuntimeError is torch's for it
            if self._saving is None:
                raise
            raise CheckpointError(self._saving_failed(self._saving, error)) from error
        return output._replace(training_loss=output.metrics["train_loss"])

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; no epoch after a checkpoint of the last step, where Trainer would make one step too many."""
        epochs, *values, max_steps = super().set_initial_training_values(*args, **kwargs)
        return 0 if self.continued_from_step >= max_steps else epochs, *values, max_steps

    # --- sums over the whole run, however often it was interrupted

    @property
    def seconds(self) -> float:
        """Seconds of training since the run began, without those that an interrupted attempt lost."""
        return self.before.get("seconds", 0.0) + time.perf_counter() - self._began

    def progress(self) -> dict[str, Any]:
        """What transformers does not save: each process's loss since the last log entry, its sum up to there, the time.

        Every process calls it, after it has written its files of a checkpoint. A subclass may add its own sums.
        """
        return {
            "loss": self.accelerator.gather(self._new_loss).flatten().tolist(),
            "loss_sum": self._logged_loss,
            "logged_step": self._logged_step,
            "seconds": self.seconds,
        }

    def continue_sums(self) -> None:
        """Set the sums to those of the checkpoint, or to zero; training begins."""
        if self._redivided:
            finish(self._redivided, self)
        self._began = time.perf_counter()
        self._new_loss = torch.tensor(self._own_loss(), device=self.args.device)
        self._logged_loss = self.before.get("loss_sum", 0.0)
        self._logged_step = self.before.get("logged_step", 0)

    def _own_loss(self) -> float:
        """This process's loss since the last log entry; the mean of all if there were other processes before."""
        saved = self.before.get("loss", 0.0)
        losses = saved if isinstance(saved, list) else [saved]
        if len(losses) == self.args.world_size:
            return losses[self.args.process_index]
        return sum(losses) / len(losses)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's; the loss is added up."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._new_loss += loss
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's; losses and times are those of the whole run, not of this attempt."""
        step = self.state.global_step
        if "loss" in logs:
            loss = self.accelerator.gather(self._new_loss).mean().item()
            logs["loss"] = loss / (step - self._logged_step)
            self._new_loss.zero_()
            self._logged_loss, self._logged_step = self._logged_loss + loss, step
        elif "train_loss" in logs:  # the last entry
            logs["train_loss"] = (self._logged_loss + self._new_loss.item()) / max(step, 0.001)
            if self.before:
                samples = step * self.get_total_train_batch_size(self.args)
                logs |= speed_metrics("train", time.time() - self.seconds, num_samples=samples, num_steps=step)
        super().log(logs, start_time)

    # --- writing

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; a checkpoint, which Trainer begins with this call, counts as unfinished from here on."""
        output, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        if output_dir and Path(output_dir) == output / name:
            self._saving = name
            if self.is_world_process_zero():
                write_text(output / UNFINISHED, name)
                (output / name / MANIFEST).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        super().save_model(output_dir, _internal_call)

    def finish_checkpoint(self) -> None:
        """Write the manifest of a checkpoint whose files are written, and delete older ones. Every process calls it."""
        assert self._saving is not None
        run, output = self.args, Path(self.args.output_dir)
        manifest = Manifest(self.state.global_step, run.world_size, zero_stage(run), self.progress())
        # progress() has waited for all processes, so all files are written
        parts = gather_object([flush(output / self._saving, run.process_index, run.world_size)])
        if self.is_world_process_zero():
            manifest.files = {name: written for part in parts for name, written in part.items()}
            seal(output / self._saving, manifest)
            (output / UNFINISHED).unlink()
            rotate_checkpoints(str(output), self._kept_checkpoints, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        self._saving = None

    def _saving_failed(self, name: str, error: Exception) -> str:
        output = Path(self.args.output_dir)
        whole = [path.name for path in map(Path, sort_checkpoints(str(output))) if (path / MANIFEST).is_file()]
        kept = f"{whole[-1]} is whole and was kept" if whole else "there is no older one"
        free = shutil.disk_usage(output).free / 2**30
        return (
            f"rank {self.args.process_index} could not write {name} ({type(error).__name__}: {error}); {kept}. "
            f"{output} has {free:.2f} GiB free: make room, then the same command continues the run."
        )


class _Events(TrainerCallback):
    """Calls the trainer when training begins, when the first step is done, and when a checkpoint was written."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.continue_sums()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self._trainer.seconds_to_first_step is None:
            launched = os.environ.get("LAUNCHED_AT") or psutil.Process().create_time()
            self._trainer.seconds_to_first_step = time.time() - float(launched)

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.finish_checkpoint()
