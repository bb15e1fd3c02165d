"""`--activation_checkpointing auto`: layers are run again in the backward pass only if their states do not fit."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.gpus import Gpu
from llava_skip.memory import Zero
from llava_skip_base.files import read_json
from llava_skip_base.machine import free_memory
from train.planning.estimate import GIB, USABLE, Machine, Training, longest_batch, parameter_counts, training_memory
from train.planning.shape import assumed

if TYPE_CHECKING:
    from train.arguments import ModelArguments, RunArguments


@dataclass(frozen=True)
class Decision:
    """Whether layers are run again, and why.

    Attributes:
        on: whether they are.
        needed: GiB that a process would take without it, at the longest batch; None where no memory is known.
        activations: GiB of them, what autograd saves.
        usable: GiB that it may take, of those that are free in the process that has the fewest.
    """

    on: bool
    needed: float | None = None
    activations: float = 0.0
    usable: float = 0.0

    def __str__(self) -> str:
        if self.needed is None:
            return "activation checkpointing is on: this system does not say how much memory is free"
        fits = "does not fit" if self.on else "fits"
        return (
            f"activation checkpointing is {'on' if self.on else 'off'}: without it the longest batch {fits}, "
            f"{self.needed:.3g} GiB ({self.activations:.3g} of them activations) of {self.usable:.3g} usable"
        )


def zero_of_file(path: Path) -> Zero:
    """How a DeepSpeed configuration divides the states of a model."""
    found = read_json(path)
    settings = found.get("zero_optimization", {}) if isinstance(found, dict) else {}
    return Zero(int(settings.get("stage", 0)), "offload_optimizer" in settings, "offload_param" in settings)


def free_of(device: torch.device) -> float | None:
    """GiB that are free for this process before its model is loaded; a CPU's memory is shared by the processes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / GIB
    free = free_memory()
    return None if free is None else free / GIB / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def decide(config: LlavaSkipConfig, training: Training, processes: int, free: float | None, element: int) -> Decision:
    """On, unless the longest batch fits without.

    A batch is as long as it can be, with an image in each sample or with none: then all its tokens take the FFN.

    Args:
        config: of the model.
        training: how it is trained; its `max_length` are the tokens of the longest sample.
        processes: of the run.
        free: GiB of a process; None: unknown.
        element: bytes of a number.
    """
    if free is None:
        return Decision(on=True)
    training, machine = replace(training, checkpointing=False), Machine("this device", Gpu(0, free), processes, 1)
    counts, length = parameter_counts(config, training.trained, training.lora_rank), training.max_length
    shapes = [assumed(1, length, length, images) for images in (1, 0)]
    loads = [longest_batch(config, shape, training) for shape in shapes]
    found = [training_memory(config, training, machine, counts, load, element) for load in loads]
    most = max(found, key=lambda memory: memory["peak"])
    return Decision(not most["fits"], most["peak"], most["activations"], free * USABLE)


def settle_checkpointing(model: ModelArguments, run: RunArguments, config: LlavaSkipConfig, longest: int) -> str | None:
    """Replace "auto" by true or false in the run's arguments, alike on every rank; every rank calls it.

    Args:
        model: what is trained.
        run: of the run.
        config: of the model.
        longest: tokens of the longest sample that the run can have.

    Returns:
        What was decided, in words; None if the arguments say it.
    """
    if run.activation_checkpointing != "auto":
        return None
    free = [value for value in gather_object([free_of(run.device)]) if value is not None]
    training = Training(
        trained=model.trained_parts,
        batch=run.per_device_train_batch_size,
        samples_per_step=run.per_device_train_batch_size * run.world_size,
        max_length=longest,
        zero=zero_of_file(Path(run.deepspeed)) if run.deepspeed else Zero(),
        lora_rank=model.lora_r if model.lora_enable else 0,
        bits=model.bits,
    )
    element = 2 if run.deepspeed and (run.bf16 or run.fp16) else 4  # else trainable weights are in float32
    decision = decide(config, training, run.world_size, min(free, default=None), element)
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # transformers has both
        setattr(run, name, decision.on)
    return str(decision)
