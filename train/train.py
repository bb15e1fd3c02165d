"""The entry point of stage 1 and of supervised fine-tuning; `scripts/finetune_skip.sh` calls it on every process."""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.processing import LlavaSkipProcessor
from train.arguments import DataArguments, ModelArguments, RunArguments, identity, resolved
from train.data import ConversationDataset, check_records, collate, load_records
from train.report import as_json, draw_loss, load_json, show_result, write_json
from train.setup import build_model, prepare
from train.trainer import SkipTrainer

USER_ERROR = 2
"""Exit code of a mistake in the arguments or the data."""


@dataclass
class Run:
    """A checked run, before any weight is loaded."""

    model_arguments: ModelArguments
    arguments: RunArguments
    config: LlavaSkipConfig
    processor: LlavaSkipProcessor
    dataset: ConversationDataset
    resolved: dict[str, Any]

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(self.arguments.output_dir)


def parse(command_line: list[str]) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Arguments from the command line.

    Raises:
        ValueError: unknown flags or values out of range.
    """
    parser = HfArgumentParser((ModelArguments, DataArguments, RunArguments))
    return parser.parse_args_into_dataclasses(command_line)


def check(model: ModelArguments, data: DataArguments, run: RunArguments) -> Run:
    """Everything that can be wrong without weights, in the order in which it is cheap to find.

    Raises:
        ValueError: see the message.
        FileNotFoundError: see the message.
    """
    arguments = resolved(model, data, run)
    check_output(Path(run.output_dir), arguments, run.overwrite)
    records = load_records(Path(data.data))
    if data.images and not Path(data.images).is_dir():
        raise FileNotFoundError(f"IMAGES {data.images} does not exist: give the folder that image paths start from.")
    config, processor = prepare(model)
    images = Path(data.images or ".")
    check_records(records, images, config.image_seq_length, data.max_length)
    dataset = ConversationDataset(records, images, processor, data.max_length)
    return Run(model, run, config, processor, dataset, arguments)


def check_output(output: Path, arguments: dict[str, Any], overwrite: bool) -> None:
    """Refuse a folder that holds anything but this very run.

    Raises:
        ValueError: says which arguments differ, or what else is in the folder.
    """
    if overwrite or not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"OUTPUT {output} is a file: give a folder.")
    record = output / "run.json"
    if not record.is_file():
        if any(output.iterdir()):
            raise ValueError(f"OUTPUT {output} holds other files: give an empty folder, or --overwrite true.")
        return
    before, now = _flat(identity(load_json(record))), _flat(identity(as_json(arguments)))
    if different := sorted(key for key in before | now if before.get(key) != now.get(key)):
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in different[:4])
        raise ValueError(
            f"OUTPUT {output} holds another run ({changes}): give another OUTPUT, the same arguments to continue it, "
            "or --overwrite true to delete it."
        )


def _flat(nested: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{group}.{key}": value for group, values in nested.items() for key, value in values.items()}


def train(run: Run) -> None:
    """Load or make the model, train it, and leave model, processor, metrics and loss curve in the output folder."""
    arguments = run.arguments
    first = arguments.process_index == 0
    if first:
        if arguments.overwrite and run.output.exists():
            shutil.rmtree(run.output)
        run.output.mkdir(parents=True, exist_ok=True)
        write_json(run.output / "run.json", run.resolved)
    with arguments.main_process_first(desc="preparing the output folder"):
        checkpoint = get_last_checkpoint(str(run.output)) if run.output.exists() else None
    set_seed(arguments.seed)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    model = build_model(run.model_arguments, run.config, dtype)
    trainer = SkipTrainer(
        model=model,
        args=arguments,
        train_dataset=run.dataset,
        data_collator=partial(collate, pad_token_id=run.processor.tokenizer.pad_token_id),
        processing_class=run.processor,
    )
    started = time.perf_counter()
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    counts = trainer.throughput()
    if first:
        _report(run, trainer, counts | {"total_seconds": time.perf_counter() - started}, outcome)


def _report(run: Run, trainer: SkipTrainer, counts: dict[str, float], outcome: Any) -> None:
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    preset = run.config.preset or "own"
    result = {
        "preset": preset,
        "skip": run.config.skip,
        "steps": outcome.global_step,
        "mean_loss": outcome.training_loss,
        "final_loss": history[-1]["loss"] if history else outcome.training_loss,
        "processes": run.arguments.world_size,
        "device": str(run.arguments.device),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "history": history,
        **counts,
    }
    write_json(run.output / "train_result.json", result)
    draw_loss(history, run.output / "loss.png", f"{preset}: training loss")
    show_result(result, run.output)


def main() -> None:
    """Check, train, and leave the process group; a user's mistake is one message and exit code 2."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        run = check(*parse(sys.argv[1:]))
    except (ValueError, OSError) as error:  # transformers answers an unknown hub name with OSError
        if rank == 0:
            sys.stderr.write(f"error: {error}\n")
        else:
            time.sleep(30)  # rank 0 speaks for all; the launcher stops the others once it has
        raise SystemExit(USER_ERROR) from None
    finished = run.output / "train_result.json"
    if finished.is_file() and not run.arguments.overwrite:
        if rank == 0:
            show_result(load_json(finished), run.output)
            sys.stderr.write(f"{run.output} holds this run, finished: nothing to do. --overwrite true repeats it.\n")
    else:
        train(run)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
