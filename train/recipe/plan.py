"""What a run would do, without any weight: `--dry_run true`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip_base.errors import UserError
from train.arguments import ModelArguments, RunArguments
from train.recipe.lora import add_lora, check_targets
from train.recipe.parts import check_groups, choose_trained, count_parameters, freeze_unused, parameter_groups


def check_plan(arguments: ModelArguments, run: RunArguments, config: LlavaSkipConfig) -> dict[str, tuple[int, int]]:
    """What learns, on the meta device: shapes without weights.

    Returns:
        part -> (parameters, those of them that learn).

    Raises:
        UserError: nothing learns, a parameter would not be optimised exactly once, or unknown --lora_targets.
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
    if not any(learns for _, learns in counts.values()):
        raise UserError(f"--train_parts {' '.join(arguments.trained_parts)} leaves nothing that learns in this model.")
    return counts


def show_plan(
    arguments: ModelArguments,
    run: RunArguments,
    config: LlavaSkipConfig,
    parts: dict[str, tuple[int, int]],
    record: dict[str, Any],
    samples: int | None,
) -> None:
    """Print a table of the run, and its resolved arguments as JSON.

    `parts` are those of `check_plan`, `samples` is None for a stream.
    """
    rates = run.part_rates
    batch = run.per_device_train_batch_size * run.world_size * run.gradient_accumulation_steps
    steps = (
        run.max_steps if samples is None or run.max_steps > 0 else round(run.num_train_epochs * -(-samples // batch))
    )
    table = Table(title=f"dry run -> {run.output_dir}", show_header=False)
    for name, value in (
        ("model", arguments.model or f"new, {arguments.size}"),
        ("preset", f"{config.preset or 'own'}: {config.image_seq_length} rows a picture"),
        ("samples", "a stream" if samples is None else f"{samples:,}"),
        ("batch", f"{batch} = {run.per_device_train_batch_size} x {run.world_size} processes "
                  f"x {run.gradient_accumulation_steps} accumulated"),
        ("steps", f"{steps:,}"),
        ("precision", "bfloat16" if run.bf16 else "float16" if run.fp16 else "float32"),
        ("DeepSpeed", str(run.deepspeed or "no")),
    ):  # fmt: skip
        table.add_row(name, value)
    for part, (whole, learns) in parts.items():
        rate = f", learning rate {rates.get(part, run.learning_rate):g}" if learns else ""
        table.add_row(part, f"{learns:,} of {whole:,} parameters learn{rate}" if whole else "none")
    Console().print(table)
    print(json.dumps(record, indent=2, sort_keys=True, default=str))
