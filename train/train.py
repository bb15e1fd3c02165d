"""The entry point of stage 1 and of supervised fine-tuning; `scripts/finetune_skip.sh` calls it on every process."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before imports that take seconds: Ctrl-C ends each process without a traceback of its own
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import set_seed

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.errors import UserError
from llava_skip.exits import NOT_SAVED, PREEMPTED, TRAINING_ERROR, USER_ERROR
from llava_skip.processing import LlavaSkipProcessor
from train.arguments import DataArguments, ModelArguments, RunArguments, identity, resolved
from train.command_line import read_command_line
from train.data import (
    ConversationDataset,
    ConversationStream,
    RecordError,
    collate,
    collate_flat,
    dropped_findings,
    load_tables,
    read_sources,
    sample_lengths,
    usable_records,
)
from train.recipe.lora import check_lora
from train.recipe.model import check_weights, make_trainable_model, prepare
from train.recipe.plan import check_plan, show_plan
from train.reporting.callbacks import check_reporters, keep_reports_in
from train.reporting.result import as_json, draw_loss, load_json, show_result, write_json
from train.resilience.exits import leave
from train.resilience.preemption import Preemption
from train.resilience.resume import CheckpointError
from train.resilience.run_folder import DROPPED, LOCK, RECORD, RESULT, RunFolder
from train.resilience.watchdog import Watchdog
from train.trainer import NonFiniteLoss, SkipTrainer

FIND_RECORDS = (
    " train.validate_data with the same arguments finds all such records; training then refuses them at its start, or "
    "drops them (--drop_faulty true)."
)
"""What to do about a record that only failed when it was read."""


class ModelError(RuntimeError):
    """A model that cannot be loaded, or whose parts do not fit each other."""


@dataclass
class Run:
    """A checked run, before any weight is loaded."""

    model_arguments: ModelArguments
    arguments: RunArguments
    config: LlavaSkipConfig
    processor: LlavaSkipProcessor
    dataset: ConversationDataset | ConversationStream
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    dropped: dict[str, Any] | None
    parts: dict[str, tuple[int, int]]
    resolved: dict[str, Any]

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(self.arguments.output_dir)


def parse(command_line: list[str]) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Arguments from the command line.

    Raises:
        UserError: unknown flags or values out of range.
    """
    model, data, run = read_command_line((ModelArguments, DataArguments, RunArguments), command_line)
    return model, data, run


def check(model: ModelArguments, data: DataArguments, run: RunArguments) -> Run:
    """Everything that can be wrong without weights, in the order in which it is cheap to find.

    Raises:
        UserError: see the message.
        MissingFileError: see the message.
    """
    arguments = resolved(model, data, run)
    check_lora(model)
    check_reporters(run)
    check_output(Path(run.output_dir), arguments, run.overwrite)
    if data.streaming and run.max_steps < 1:
        raise UserError("--streaming needs --max_steps: a stream has no end that a run could stop at.")
    sources = read_sources(data.data, data.images)
    records = None if data.streaming else load_tables(sources)
    config, processor = prepare(model)
    check_weights(model)
    parts = check_plan(model, run, config)
    collator = collate_flat if data.padding_free else partial(collate, pad_token_id=processor.tokenizer.pad_token_id)
    if records is None:
        stream = ConversationStream(
            sources, processor, data.max_length, data.drop_faulty, data.shuffle_buffer, run.seed
        )  # fmt: skip
        return Run(model, run, config, processor, stream, collator, None, parts, arguments)
    records, errors = usable_records(records, processor, data.max_length, data.data_processes, data.drop_faulty)
    dropped = dropped_findings(records, errors) if errors else None
    check_dropped(Path(run.output_dir), dropped, run.overwrite)
    lengths = None
    if data.group_by_modality_length:
        lengths = sample_lengths(records, processor, data.max_length, data.data_processes)
    dataset = ConversationDataset(records, processor, data.max_length, lengths)
    step = run.per_device_train_batch_size * run.world_size
    if run.dataloader_drop_last and len(dataset) < step:
        raise UserError(
            f"--dataloader_drop_last true leaves no step: there are {len(dataset)} samples, and one takes {step}."
        )
    return Run(model, run, config, processor, dataset, collator, dropped, parts, arguments)


def check_dropped(output: Path, dropped: dict[str, Any] | None, overwrite: bool) -> None:
    """Refuse to continue a run with other records than it began with: its data order would be another one.

    Raises:
        UserError: other records are dropped now than when the run began.
    """
    if overwrite or not (output / RECORD).is_file():
        return
    record = output / DROPPED
    before = load_json(record) if record.is_file() else None
    if before != as_json(dropped):
        counts = [0 if report is None else len(report["records"]) for report in (before, dropped)]
        raise UserError(
            f"OUTPUT {output} began with {counts[0]} dropped records, and now {counts[1]} would be: restore the data "
            "as it was to continue, or start anew with another OUTPUT or --overwrite true."
        )


def check_same_records(run: Run) -> None:
    """Refuse processes that read other records than rank 0: their steps would be of other samples. Every rank calls it.

    Raises:
        UserError: names the first such process.
    """
    if isinstance(run.dataset, ConversationStream):
        return
    dropped = run.dropped["records"] if run.dropped else []
    views = gather_object([(socket.gethostname(), len(run.dataset), dropped)])
    if different := [rank for rank, view in enumerate(views) if view[1:] != views[0][1:]]:
        told = [
            f"rank {rank} on {views[rank][0]} reads {views[rank][1]} records and drops {len(views[rank][2])}"
            for rank in (different[0], 0)
        ]
        raise UserError(f"{', '.join(told)}: DATA and IMAGES must be the same on all machines.")


def check_output(output: Path, arguments: dict[str, Any], overwrite: bool) -> None:
    """Refuse a folder that holds anything but this very run.

    Raises:
        UserError: says which arguments differ, or what else is in the folder.
    """
    if overwrite or not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"OUTPUT {output} is a file: give a folder.")
    record = output / RECORD
    if not record.is_file():
        if any(path.name != LOCK for path in output.iterdir()):
            raise UserError(f"OUTPUT {output} holds other files: give an empty folder, or --overwrite true.")
        return
    before, now = _flat(identity(load_json(record))), _flat(identity(as_json(arguments)))
    if different := sorted(key for key in before | now if before.get(key) != now.get(key)):
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in different[:4])
        raise UserError(
            f"OUTPUT {output} holds another run ({changes}): give another OUTPUT, the same arguments to continue it, "
            "or --overwrite true to delete it."
        )


def _flat(nested: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{group}.{key}": value for group, values in nested.items() for key, value in values.items()}


def train(run: Run, checkpoint: Path | None = None) -> bool:
    """Load or make the model, train it, and leave model, processor, metrics and loss curve in the output folder.

    Returns:
        Whether the run is finished; it is not if a signal asked it to leave.

    Raises:
        ModelError: the model cannot be loaded.
        RecordError: a record cannot be trained on, which the checks before the run did not look for.
        CheckpointError: a checkpoint could not be written.
        NonFiniteLoss: the loss is NaN or infinite.
    """
    arguments = run.arguments
    set_seed(arguments.seed)
    keep_reports_in(run.output)
    try:
        learner = make_trainable_model(run.model_arguments, arguments, run.config)
    except (ValueError, OSError, SafetensorError) as error:
        raise ModelError(f"{run.model_arguments.model or 'a new model'} cannot be loaded: {error}") from error
    preemption = Preemption()
    trainer = SkipTrainer(
        model=learner,
        args=arguments,
        train_dataset=run.dataset,
        data_collator=run.collator,
        processing_class=run.processor,
        callbacks=[preemption, Watchdog(arguments.hang_timeout_seconds)],
        record=run.resolved,
    )
    started = time.perf_counter()
    outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if preemption.agreed:
        return False
    trainer.save_model()
    counts = trainer.throughput()
    if arguments.process_index == 0:
        _report(run, trainer, counts | {"total_seconds": time.perf_counter() - started}, outcome)
    return True


def _report(run: Run, trainer: SkipTrainer, counts: dict[str, float], outcome: Any) -> None:
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    preset = run.config.preset or "own"
    result = {
        "preset": preset,
        "skip": run.config.skip,
        "steps": outcome.global_step,
        "mean_loss": outcome.training_loss,
        "final_loss": history[-1]["loss"] if history else outcome.training_loss,
        "seconds_to_first_step": trainer.seconds_to_first_step,
        "continued_from_step": trainer.continued_from_step,
        "processes": run.arguments.world_size,
        "device": str(run.arguments.device),
        "parameters": sum(whole for whole, _ in run.parts.values()),
        "dropped": len({error["row"] for error in run.dropped["records"]}) if run.dropped else 0,
        "history": history,
        **counts,
    }
    write_json(run.output / RESULT, result)
    draw_loss(history, run.output / "loss.png", f"{preset}: training loss")
    show_result(result, run.output)


def silence_libraries() -> None:
    """Drop what DeepSpeed and PEFT call by its old name: a line for each call and process, and nothing to be done."""
    for pattern in (r"`torch\.distributed\.\w+` is deprecated", "`is_gradient_checkpointing` is deprecated"):
        warnings.filterwarnings("ignore", pattern, FutureWarning)


def _tell(error: Exception) -> None:
    """Say what ended the run: rank 0 for all, whom the launcher then stops; a rank that lives on has failed alone."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(30)
    whose = f"rank {rank} on {socket.gethostname()}: " if rank else ""
    sys.stderr.write(f"error: {whose}{error}\n")
    sys.stderr.flush()


def main() -> None:
    """Check and train; leave with the run's exit code."""
    silence_libraries()
    code = _run(sys.argv[1:])
    if not torch.distributed.is_initialized():
        raise SystemExit(code)
    if code != USER_ERROR:
        torch.distributed.destroy_process_group()
    leave(code)


def _run(command_line: list[str]) -> int:
    """The run of a command line, to its exit code; a user's mistake is one message."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        run = check(*parse(command_line))
        if run.arguments.dry_run:
            if rank == 0:
                samples = len(run.dataset) if isinstance(run.dataset, ConversationDataset) else None
                show_plan(run.model_arguments, run.arguments, run.config, run.parts, run.resolved, samples)
            return 0
        check_same_records(run)
        folder = RunFolder(run.arguments, run.resolved, run.dropped)
        finished = folder.is_finished()
        checkpoint = None if finished else folder.open()
    except (ValueError, OSError) as error:  # transformers answers an unknown hub name with OSError
        _tell(error)
        return USER_ERROR
    if finished:
        if rank == 0:
            show_result(load_json(run.output / RESULT), run.output)
            sys.stderr.write(f"{run.output} holds this run, finished: nothing to do. --overwrite true repeats it.\n")
        return 0
    return 0 if _train_or_explain(run, checkpoint) else PREEMPTED


def _train_or_explain(run: Run, checkpoint: Path | None) -> bool:
    try:
        return train(run, checkpoint)
    except ModelError as error:
        _tell(error)
        os._exit(USER_ERROR)
    except (RecordError, CheckpointError, NonFiniteLoss) as error:
        code = {RecordError: USER_ERROR, CheckpointError: NOT_SAVED, NonFiniteLoss: TRAINING_ERROR}[type(error)]
        sys.stderr.write(f"\nerror: {error}{FIND_RECORDS if code == USER_ERROR else ''}\n")
        sys.stderr.flush()
        os._exit(code)  # the others wait for this process: it cannot take leave of them in good order


if __name__ == "__main__":
    main()
