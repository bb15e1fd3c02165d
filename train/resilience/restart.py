"""A restart with another number of processes or another ZeRO stage than the checkpoint was written with."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from llava_skip_base.errors import UserError
from train.resilience.checkpoint import Manifest
from train.resilience.layout import described
from train.resilience.universal import convert, remove, restore_groups


def zero_stage(arguments: TrainingArguments) -> int | None:
    """DeepSpeed's ZeRO stage; None without DeepSpeed."""
    plugin = getattr(arguments, "deepspeed_plugin", None)
    return None if plugin is None else plugin.zero_stage


def prepare(checkpoint: Path, arguments: Any) -> None:
    """Convert a checkpoint that other processes or another stage have divided, and say so. Only one process calls this.

    Raises:
        UserError: it cannot be converted; says what to do.
    """
    remove(checkpoint)  # what an attempt left that ended while it converted
    stage, manifest = zero_stage(arguments), Manifest.read(checkpoint)
    if not is_redivided(manifest, arguments):
        return
    was, now = _described(manifest.world_size, manifest.zero_stage), _described(arguments.world_size, stage)
    # Stages 1 to 3 are alike; stage 0 and no DeepSpeed save files of other kinds.
    if (stage and 1) != (manifest.zero_stage and 1):
        how = "without DeepSpeed"
        if manifest.zero_stage is not None:
            how = f"under a ZeRO stage, such as {manifest.zero_stage}"
        raise UserError(
            f"{checkpoint} was written by {was}, and this run has {now}: continue it {how}, or start another run from "
            f"its weights (--model {checkpoint}, another OUTPUT)."
        )
    own = arguments.own_layout
    _say(f"{checkpoint.name} was written by {was}, and this run has {now}. A step has the same samples: {own}.")
    if stage:
        _say("converting it by DeepSpeed's universal checkpointing ...")
        started = time.perf_counter()
        convert(checkpoint, stage)
        _say(f"converted in {time.perf_counter() - started:.1f} s.")


def is_redivided(manifest: Manifest, arguments: TrainingArguments) -> bool:
    """Whether other processes or another stage than now have written a checkpoint."""
    return (manifest.world_size, manifest.zero_stage) != (arguments.world_size, zero_stage(arguments))


def read_universal(arguments: TrainingArguments) -> None:
    """Let DeepSpeed read the converted form; call it before DeepSpeed starts."""
    if zero_stage(arguments):
        arguments.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": True}


def finish(checkpoint: Path, trainer: Any) -> None:
    """After a converted checkpoint was read: what it does not restore. Every process calls it.

    Each process draws random numbers of its own: those of the checkpoint are of other processes.
    """
    run, engine = trainer.args, trainer.model_wrapped
    if zero_stage(run):
        restore_groups(checkpoint, engine.optimizer.optimizer)
        engine.load_universal_checkpoint = lambda: False  # a checkpoint that is read at the end is one of this run
    torch.manual_seed(run.seed + trainer.state.global_step * run.world_size + run.process_index)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        remove(checkpoint)


def _described(processes: int, stage: int | None) -> str:
    return f"{described(processes)} {'without DeepSpeed' if stage is None else f'under ZeRO-{stage}'}"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
