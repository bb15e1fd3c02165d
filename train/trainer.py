"""transformers' Trainer with a learning rate for each part, metrics of each logging window, and a check of the loss."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, ProgressCallback, TrainerControl
from transformers.trainer_utils import seed_worker

from llava_skip.vision.values import PixelValues
from llava_skip_base.errors import UserError
from llava_skip_base.files import write_json
from train.data import COUNTED, ConversationStream, stream_loader
from train.data.features import FEATURES, FeatureWriter
from train.data.loading import DataWait
from train.data.packing import Packed, PackSampler, collate_packs
from train.data.relaid import Relaid, Rounds, order_of
from train.data.sampler import ModalityLengthSampler
from train.recipe.parts import check_groups, count_parameters, parameter_groups
from train.reporting.callbacks import JsonLines, LogLine, Progress
from train.reporting.metrics import COUNTS, Meter, peak_tflops, rates
from train.resilience.checkpoint import find_fault
from train.resilience.finite import FiniteChecks
from train.resilience.resume import ResumableTrainer
from train.validation import AtStepEnd, Validation


class SkipTrainer(ResumableTrainer):
    """Trainer for the parts of a llava-skip model.

    Attributes:
        control: Trainer's: what is asked for after this step.

    Args:
        resolved: the run's arguments, saved with the weights.
        validation: of the run; None if there is none.
        features: what writes the features of the tower; None: they are not stored.
        packs: the batches of an epoch, if their tokens are fixed.
        *args: as Trainer's.
        **kwargs: as Trainer's.
    """

    control: TrainerControl

    def __init__(
        self,
        *args: Any,
        resolved: dict[str, Any],
        validation: Validation | None = None,
        features: FeatureWriter | None = None,
        packs: PackSampler | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._resolved, self._validation, self._features, self._packs = resolved, validation, features, packs
        if features is not None:
            self.add_callback(features)
        # Trainer would load the best weights into this process; `export` takes them from the checkpoint.
        self._exports_best, self.args.load_best_model_at_end = self.args.load_best_model_at_end, False
        if self.args.loss_normalization == "micro_batch":
            self.model_accepts_loss_kwargs = False  # the model's mean over a micro batch, Trainer's over those
        self._trained = [part for part, (_, trainable) in count_parameters(self.model).items() if trainable]
        self._meter = Meter(
            self.model.config,
            "language_model" in self._trained and not isinstance(self.model, PeftModel),
            self.args.device,
            peak_tflops(self.args.device, self.args.peak_tflops),
            self.accelerator.gather,
        )
        self._finite = FiniteChecks(self)
        self._values = PixelValues.of(self.processing_class)
        self._wait = DataWait(self.args.device, self.args.dataloader_num_workers)
        self._records: list[Any] = []
        """Names of the records of the micro batch."""
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)
        if sys.stderr.isatty() and not self.args.disable_tqdm:
            self.add_callback(Progress)
        self.add_callback(AtStepEnd)
        self.add_callback(LogLine)
        self.add_callback(JsonLines)

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's; what computes the norm of the gradient, which Trainer asks for at every step, has it checked."""
        super().create_accelerator_and_postprocess()
        self.accelerator.clip_grad_norm_ = partial(self._clip, self.accelerator.clip_grad_norm_)

    def _clip(self, clip: Callable[..., Any], parameters: Iterable[nn.Parameter], limit: float) -> Any:
        """The gradient's norm; a gradient that is not finite stays as it is, so that the tensors can be named."""
        if self.is_deepspeed_enabled:  # it has made the step, or left it out
            self._finite.note_norm(norm := clip(parameters, limit))
            return norm
        self.accelerator.unscale_gradients()
        given = [parameter for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(parameter.grad for parameter in given if parameter.grad is not None)
        self._finite.note_norm(norm)
        if limit < math.inf:
            nn.utils.clip_grads_with_norm_(given, limit, norm.nan_to_num(nan=0.0, posinf=math.inf))
        return norm

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer, over groups by learning rate and weight decay.

        Raises:
            UserError: a trainable parameter is not in exactly one group, or the optimizer makes its own groups.
        """
        if self.optimizer is not None:
            return self.optimizer
        source = self.model if model is None else model
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, source)
        if {"params", "model", "optimizer_dict"} & set(options):
            raise UserError(
                f"--optim {self.args.optim} makes its own groups, without learning rates by part: use another."
            )
        decays, run = self.get_decay_parameter_names(source), self.args
        groups = parameter_groups(source, decays, run.part_rates, run.learning_rate, run.weight_decay)
        self.optimizer_cls_and_kwargs = (kind, options | {"params": groups})
        optimizer = super().create_optimizer(model)
        check_groups(source, optimizer.param_groups)
        return optimizer

    def get_batch_samples(self, epoch_iterator: Iterator, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; the wait for the batches is measured, and a step without supervised tokens has the loss 0."""
        batches, tokens = super().get_batch_samples(self._meter.timed(epoch_iterator), *args, **kwargs)
        return batches, tokens.clamp(min=1) if isinstance(tokens, Tensor) else tokens  # 0 / 1 instead of 0 / 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of a micro batch, whose `record_ids` (list) are named if its loss is not finite.

        Raises:
            NotFinite: its loss is not, or the gradient of the step before was not.
        """
        inputs = dict(inputs)
        self._records = inputs.pop("record_ids", [])
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._finite.check_loss()
        return loss

    def get_train_dataloader(self) -> DataLoader:
        """Of a stream, which divides its own records; by modality and length for a set with lengths; else Trainer's."""
        if isinstance(self.train_dataset, ConversationStream):
            return stream_loader(self.train_dataset, self.args, self.data_collator)
        if self._packs is not None:  # whole batches, which other processes take in turn as well
            return self._loader(
                Packed(self.train_dataset), self._packs, partial(collate_packs, collator=self.data_collator)
            )
        run, begun = self.args, self.args.layout
        lengths = getattr(self.train_dataset, "lengths", None)
        if lengths is None:
            loader = super().get_train_dataloader()
        else:
            batches = begun.processes * begun.accumulation
            loader = self._loader(self.train_dataset, ModalityLengthSampler(lengths, begun.batch, batches, run.seed))
        if begun == run.own_layout:
            return loader
        rounds = Rounds(order_of(loader), begun.round, run.own_layout.round, run.dataloader_drop_last)
        return self._loader(Relaid(self.train_dataset), rounds)

    def _loader(self, dataset: Any, sampler: Sampler, collator: Any = None) -> DataLoader:
        run = self.args
        loader = DataLoader(
            dataset,
            batch_size=run.train_batch_size,
            sampler=sampler,
            collate_fn=collator or self.data_collator,
            num_workers=run.dataloader_num_workers,
            pin_memory=run.dataloader_pin_memory,
            persistent_workers=run.dataloader_persistent_workers,
            prefetch_factor=run.dataloader_prefetch_factor,
            multiprocessing_context=run.dataloader_multiprocessing_context,
            in_order=run.dataloader_in_order,
            drop_last=run.dataloader_drop_last,
            worker_init_fn=partial(seed_worker, num_workers=run.dataloader_num_workers, rank=run.process_index),
        )
        return self.accelerator.prepare(loader)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The model's loss; the batch is counted."""
        self._meter.count(inputs)
        for name in COUNTED:
            inputs.pop(name, None)
        if self._values is not None and "pixel_values" in inputs:
            inputs["pixel_values"] = self._values(inputs["pixel_values"], self._inputs_dtype())
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        features: Any = inputs.get(FEATURES)
        if self._features is not None and features is not None:
            self._features.keep(features)
        self._finite.note_loss(loss, self._records)
        return loss

    def _inputs_dtype(self) -> torch.dtype:
        """The number format that Trainer gives to inputs that are no whole numbers."""
        if not self.is_deepspeed_enabled:
            return torch.float32
        return self.accelerator.state.deepspeed_plugin.hf_ds_config.dtype()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log the loss of the validation data; errors as `Validation.measure`, and `NotFinite` for the weights."""
        assert self._validation is not None
        self._finite.check_weights()
        with self._meter.paused():
            metrics = self._validation.measure(self.model_wrapped, self.accelerator, self._note_batch)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _note_batch(self) -> None:
        self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's; with the metrics of the window that ends, over all ranks."""
        if "loss" in logs:
            logs |= self._part_rates(logs.get("learning_rate")) | self._meter.close_window()
            if self.is_world_process_zero():
                self._wait.note(*self._meter.last_wait)
        super().log(logs, start_time)

    def _part_rates(self, first: float | None) -> dict[str, float]:
        """Learning rates by part: Trainer logs the rate of the first group, and all groups follow one schedule."""
        if first is None or self.optimizer is None:
            return {}
        share = first / self.optimizer.param_groups[0].get("initial_lr", self.args.learning_rate)
        own = self.args.part_rates
        return {f"learning_rate/{part}": share * own.get(part, self.args.learning_rate) for part in self._trained}

    def progress(self) -> dict[str, Any]:
        """Also the totals of what was counted."""
        return super().progress() | {"counts": self._meter.so_far()}

    def continue_sums(self) -> None:
        """Also the totals of what was counted."""
        super().continue_sums()
        if self.before:
            self._meter.totals = self.before["counts"]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, on all ranks; with the run's arguments in the same folder.

        Raises:
            NotFinite: the weights are not; nothing is written.
        """
        self._finite.check_weights()
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            write_json(folder / "run.json", self._resolved, sort_keys=True)
            if isinstance(self.model, PeftModel):
                self.model.config.save_pretrained(folder)

    def export(self) -> str | None:
        """Write the trained model into the run's folder; every process calls it.

        Returns:
            The checkpoint with the lowest validation loss, if the model is that one.

        Raises:
            NotFinite: as `save_model`.
        """
        self.save_model()
        output, best = Path(self.args.output_dir), None
        if self._exports_best and self.state.best_global_step:
            best = output / f"checkpoint-{self.state.best_global_step}"
        if best is None or not self.args.should_save:
            return None
        if fault := find_fault(best):
            sys.stderr.write(
                f"{best} had the lowest validation loss and is not whole ({fault}): the last is exported.\n"
            )
            return None
        for file in best.iterdir():  # a checkpoint has the files of an export, and others
            if file.is_file() and (output / file.name).is_file():
                shutil.copyfile(file, output / file.name)
        return best.name

    def throughput(self) -> dict[str, float]:
        """Sums over all ranks since the run's first step, and rates from them. Every rank must call it."""
        totals = self._meter.so_far()
        return {name: totals[name] for name in (*COUNTS, "seconds")} | rates(totals)
