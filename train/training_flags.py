"""Which of transformers' TrainingArguments a run takes.

The table is the whole list: a flag of TrainingArguments that is not in it is refused by its name, on the command line
and in a recipe, before anything is loaded. A flag belongs here once a test runs or resolves it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import torch
from transformers import TrainingArguments, get_scheduler

from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json

INHERITED = (
    "activation_checkpointing_kwargs", "adam_beta1", "adam_epsilon", "dataloader_persistent_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "ddp_broadcast_buffers", "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters", "ddp_timeout", "local_rank", "log_level", "log_level_replica", "log_on_each_node",
    "logging_first_step", "logging_strategy", "lr_scheduler_kwargs", "save_strategy", "tf32", "torch_empty_cache_steps",
    "train_sampling_strategy", "use_liger_kernel",
)  # fmt: skip
"""Flags that keep transformers' meaning and default; `--help-all` has them."""

INSTEAD = {
    "accelerator_config": "--deepspeed with a file of your own",
    "auto_find_batch_size": "--per_device_train_batch_size with a smaller number",
    "average_tokens_across_devices": "--loss_normalization",
    "bf16_full_eval": "--bf16, which validation follows",
    "data_seed": "--seed, which is for the data, too",
    "do_eval": "--eval_strategy steps or epoch",
    "eval_on_start": "the first validation, which --eval_steps or --save_steps says when to make",
    "do_predict": "llava-skip eval",
    "do_train": "the command without it: it always trains",
    "enable_jit_checkpoint": "the command without it: a run saves a checkpoint at SIGTERM anyway",
    "fp16_full_eval": "--fp16, which validation follows",
    "fsdp": "--deepspeed zero3",
    "fsdp_config": "--deepspeed zero3",
    "gradient_checkpointing_kwargs": "--activation_checkpointing_kwargs",
    "ignore_data_skip": "the command without it: a run continues where its data stood",
    "include_num_input_tokens_seen": "train_log.jsonl, which has the tokens",
    "length_column_name": "--group_by_modality_length true",
    "liger_kernel_config": "--use_liger_kernel true, which takes each kernel that fits",
    "logging_nan_inf_filter": "the command without it: a loss that is not finite ends a run",
    "optim_target_modules": "--lora_enable true with --lora_targets",
    "parallelism_config": "--deepspeed zero3",
    "push_to_hub": "`hf upload` with the output folder, after the run",
    "remove_unused_columns": "the command without it: records are encoded as they are read",
    "resume_from_checkpoint": "the same command again: it continues from its last checkpoint",
    "save_on_each_node": "an OUTPUT that all machines share",
    "save_only_model": "the model in the output folder: a checkpoint is what a run continues from",
}
"""Flags that are refused, and what to use for the same purpose."""

CHOICES: dict[str, tuple[str, ...]] = {
    "eval_strategy": ("no", "steps", "epoch"),
    "lr_scheduler_type": (
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
    ),
    "optim": (
        "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_bnb_8bit",
        "paged_adamw_32bit", "paged_adamw_8bit",
    ),
    "save_strategy": ("no", "steps", "epoch"),
    "train_sampling_strategy": ("random", "sequential"),
}  # fmt: skip
"""Flags of which a run takes some values only."""
_INSTEAD_OF_VALUES = {"group_by_length": "--group_by_modality_length true"}


def refuse_unsupported(words: Iterable[str], own: Iterable[str]) -> None:
    """Refuse flags of TrainingArguments that a run does not take.

    Args:
        words: of the command line, with `_` in names, and with those of the recipe.
        own: names of the flags that the project defines itself.

    Raises:
        UserError: names the first one, and what to use instead.
    """
    refused = {entry.name for entry in fields(TrainingArguments)}.difference(INHERITED, own)
    for word in words:
        name = word.partition("=")[0].removeprefix("--") if word.startswith("--") else ""
        if name in refused or (name := name.removeprefix("no_")) in refused:  # --no_x turns a switch off
            use = f": use {INSTEAD[name]}" if name in INSTEAD else ""
            raise UserError(f"--{name} of transformers is not supported{use}. --help-all lists what is.")


def check_optimizer(arguments: TrainingArguments) -> None:
    """The package of an optimizer of another project must be there.

    Raises:
        UserError: it is not.
    """
    name = str(arguments.optim.value)
    if ("bnb" in name or "paged" in name) and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--optim {name} needs a package: pip install bitsandbytes.")


def check_zero_file(path: str) -> None:
    """A DeepSpeed configuration must be JSON, and leave optimizer and schedule to the arguments.

    Raises:
        UserError: it does not.
        MissingFileError: there is no such file.
    """
    content = read_json(Path(path))
    if not isinstance(content, dict):
        raise UserError(f"--deepspeed {path} must hold a JSON object.")
    for section in ("optimizer", "scheduler"):
        if section in content:
            raise UserError(
                f"--deepspeed {path} has a section {section!r}, which would take the place of --optim, "
                "--learning_rates and --lr_scheduler_type: leave it out."
            )


def check_schedule(arguments: TrainingArguments) -> None:
    """Make the schedule of the learning rate for a parameter of no model: its own arguments must fit.

    Raises:
        UserError: --lr_scheduler_kwargs lacks an argument of the schedule, or has an unknown one.
    """
    steps = arguments.max_steps if arguments.max_steps > 0 else 100
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate),
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--lr_scheduler_type {arguments.lr_scheduler_type.value} does not go with --lr_scheduler_kwargs "
            f"{arguments.lr_scheduler_kwargs}: {error}"
        ) from error


def check_choices(arguments: TrainingArguments) -> None:
    """Refuse values that a run does not take.

    Raises:
        UserError: names the flag and the known values.
    """
    for name, known in CHOICES.items():
        given = getattr(arguments, name)
        value = str(getattr(given, "value", given))  # of an enumeration of transformers
        if value not in known:
            use = f" Use {_INSTEAD_OF_VALUES[value]}." if value in _INSTEAD_OF_VALUES else ""
            raise UserError(f"--{name} is {value!r}; it must be one of {', '.join(known)}.{use}")
