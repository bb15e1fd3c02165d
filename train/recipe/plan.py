"""What a run would do, without loading weights: `--dry_run true`."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip_base.console import make_table, output_console
from llava_skip_base.errors import UserError
from train.recipe.lora import add_lora, check_targets
from train.recipe.parts import check_groups, choose_trained, count_parameters, freeze_unused, parameter_groups

if TYPE_CHECKING:
    from train.arguments import ModelArguments, RunArguments
    from train.data.packing import PackSampler


def check_plan(arguments: ModelArguments, run: RunArguments, config: LlavaSkipConfig) -> dict[str, tuple[int, int]]:
    """Count the trainable parameters, on the meta device.

    Returns:
        part -> (parameters, trainable parameters).

    Raises:
        UserError: nothing is trainable, a parameter would not be optimised exactly once, or unknown --lora_targets.
    """
    with torch.device("meta"):
        model: Any = LlavaSkipForConditionalGeneration(config)
        choose_trained(model, arguments.trained_parts)
        if arguments.lora_enable:
            check_targets(model, arguments)
            model = add_lora(model, replace(arguments, bits=16))
    freeze_unused(model, config)
    check_groups(model, parameter_groups(model, (), run.part_rates, run.learning_rate, run.weight_decay))
    counts = count_parameters(model)
    if not any(trainable for _, trainable in counts.values()):
        raise UserError(f"--train_parts {' '.join(arguments.trained_parts)} leaves nothing trainable in this model.")
    return counts


def show_plan(
    arguments: ModelArguments,
    run: RunArguments,
    config: LlavaSkipConfig,
    parts: dict[str, tuple[int, int]],
    record: dict[str, Any],
    samples: int | None,
    packs: PackSampler | None = None,
) -> None:
    """Print a table of the run, and its resolved arguments as JSON.

    `parts` are from `check_plan`; `samples` is None for a stream, `packs` where a batch is a number of samples.
    """
    batch = run.per_device_train_batch_size * run.world_size * run.gradient_accumulation_steps
    steps = run.max_steps
    if samples is not None and steps <= 0:
        steps = math.ceil(run.num_train_epochs * -(-(samples if packs is None else len(packs)) // batch))  # as Trainer
    rival = "" if config.reduction is None else f", {config.reduction_config}"
    rows = [
        ("model", arguments.model or f"new, {arguments.size}"),
        ("preset", f"{config.preset or 'own'}{rival}: {config.image_seq_length} tokens of an image"),
        ("samples", "a stream" if samples is None else f"{samples:,}"),
        ("batch", f"{batch} = {run.per_device_train_batch_size} x {run.world_size} processes "
                  f"x {run.gradient_accumulation_steps} accumulated"),
        *([] if packs is None else [("batches", str(packs)),
                                    ("samples a step", f"{batch * packs.samples:,.1f} on average")]),
        ("steps", f"{steps:,}"),
        ("precision", "bfloat16" if run.bf16 else "float16" if run.fp16 else "float32"),
        ("DeepSpeed", str(run.deepspeed or "no")),
    ]  # fmt: skip
    for part, (whole, trainable) in parts.items():
        rate = f", learning rate {run.part_rates.get(part, run.learning_rate):g}" if trainable else ""
        rows.append((part, f"{trainable:,} of {whole:,} trainable parameters{rate}" if whole else "none"))
    output_console().print(make_table(f"dry run -> {run.output_dir}", ("", ""), rows))
    print(json.dumps(record, indent=2, sort_keys=True, default=str))
