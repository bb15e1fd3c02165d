"""What is checked before a run loads weights; everything that a user can get wrong shows here."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.processing import LlavaSkipProcessor
from llava_skip.vision.values import PixelValues
from llava_skip_base.errors import UserError
from llava_skip_base.files import as_json, read_json
from train.arguments import KINDS, DataArguments, ModelArguments, RunArguments, identity, resolved
from train.benchmarks import check_benchmarks
from train.command_line import read_command_line
from train.data import (
    ConversationDataset,
    ConversationStream,
    RecordSet,
    collate,
    collate_counted,
    collate_flat,
    dropped_findings,
    load_tables,
    read_sources,
    sample_lengths,
    unread_columns,
    usable_records,
)
from train.data.packing import PackSampler
from train.recipe.features import check_features
from train.recipe.liger import check_liger
from train.recipe.lora import check_lora
from train.recipe.model import check_weights, prepare
from train.recipe.packing import attends_per_sample, check_packing
from train.recipe.plan import check_plan
from train.reporting.callbacks import check_reporters
from train.resilience.layout import RECORD, begun_with, continued, described, read_record
from train.resilience.run_folder import DROPPED, LOCK, on_first_rank
from train.seeds import default_output
from train.training_flags import check_optimizer, check_schedule
from train.validation import check_validation, eval_sources, split

_BATCH, _ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"


@dataclass
class Run:
    """A checked run, before any weight is loaded.

    `unread` counts the columns of its data that nothing reads; `features` is where those of its tower are stored;
    `packs` chooses the samples of a batch by their tokens; `per_sample` is whether each is attended to by itself.
    """

    model_arguments: ModelArguments
    arguments: RunArguments
    config: LlavaSkipConfig
    processor: LlavaSkipProcessor
    dataset: ConversationDataset | ConversationStream
    validation: ConversationDataset | None
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    dropped: dict[str, Any] | None
    parts: dict[str, tuple[int, int]]
    resolved: dict[str, Any]
    unread: dict[str, int] = field(default_factory=dict)
    features: Path | None = None
    packs: PackSampler | None = None
    per_sample: bool = False

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(self.arguments.output_dir)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample that the run can have; of those that were measured, if they were.

        Of a whole batch, where its tokens are what is fixed.
        """
        if self.packs is not None:
            return self.packs.most
        lengths = getattr(self.dataset, "lengths", None)
        return self.dataset.max_length if lengths is None else int(abs(lengths).max())


def parse(command_line: list[str]) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Arguments from the command line; a run that continues on other processes takes the same samples a step.

    Raises:
        UserError: unknown flags or values out of range.
    """
    model, data, run = read_command_line(KINDS, command_line)
    output = run.output_dir or default_output(model.preset)
    begun = None
    if not run.overwrite:
        begun = on_first_rank(run.process_index, lambda: begun_with(Path(output), run.world_size))
    if begun is not None:
        same_batches = run.loss_normalization == "micro_batch" or data.max_tokens_per_batch is not None
        layout = continued(begun, run.own_layout, same_batches, Path(output))
        if layout != run.own_layout:
            sizes = {_BATCH: layout.batch, _ACCUMULATION: layout.accumulation}
            words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
            model, data, run = read_command_line(KINDS, [*command_line, *words])
        run.layout = begun
    run.output_dir = output
    return model, data, run


def _check_stream(data: DataArguments, run: RunArguments) -> None:
    if data.streaming and run.world_size != run.layout.processes:
        raise UserError(
            f"OUTPUT {run.output_dir} holds a run that reads a stream, whose records are divided among its processes: "
            f"continue it with {described(run.layout.processes)}, not {run.world_size}."
        )
    if data.streaming and run.max_steps < 1:
        raise UserError("--streaming needs --max_steps: a stream has no end that a run could stop at.")


def check(model: ModelArguments, data: DataArguments, run: RunArguments) -> Run:
    """Everything that can be wrong without weights, in the order in which it is cheap to find.

    Raises:
        UserError: see the message.
    """
    arguments = resolved(model, data, run)
    check_lora(model)
    check_reporters(run)
    check_optimizer(run)
    check_schedule(run)
    check_output(Path(run.output_dir), arguments, run.overwrite)
    _check_stream(data, run)
    check_packing(data, run)
    check_validation(data, run)
    check_benchmarks(model, run)
    sources = read_sources(data.data, data.images)
    table = None if data.streaming else load_tables(sources)
    held_out = load_tables(eval_sources(data)) if data.eval_data else None
    config, processor = prepare(model)
    check_liger(run, config)
    per_sample = attends_per_sample(model, data, config)
    check_features(model, data, run, config)
    check_weights(model, config)
    parts = check_plan(model, run, config)
    collator = collate_flat if data.padding_free else partial(collate, pad_token_id=processor.tokenizer.pad_token_id)
    collator = partial(collate_counted, collator=collator, config=config)
    usable = partial(
        usable_records, processor=processor, max_length=data.max_length, processes=data.data_processes,
        drop_faulty=data.drop_faulty,
    )  # fmt: skip
    dropped: dict[str, Any] = {}
    if table is not None:
        records, errors = usable(table)
        dropped |= dropped_findings(records, errors) if errors else {}
    if held_out is not None:
        held_out, errors = usable(held_out)
        dropped |= {"validation": dropped_findings(held_out, errors)} if errors else {}
    check_dropped(Path(run.output_dir), dropped or None, run.overwrite)
    unread: dict[str, int] = {}
    packs = None
    as_bytes = PixelValues.of(processor) is not None
    if table is None:
        dataset: Any = ConversationStream(
            sources, processor, data.max_length, data.drop_faulty, data.shuffle_buffer, run.seed, as_bytes=as_bytes
        )  # fmt: skip
    else:
        unread = unread_columns(table, processor, data.max_length)
        if data.eval_share:
            records, held_out = split(records, data.eval_share, run.seed)
        dataset, packs = _training_set(records, processor, data, run, as_bytes)
    validation = None
    if held_out is not None:
        validation = ConversationDataset(held_out, processor, data.max_length, as_bytes=as_bytes)
    return Run(
        model, run, config, processor, dataset, validation, collator, dropped or None, parts, arguments, unread,
        features=None if data.cache_vision_features is None else Path(data.cache_vision_features).expanduser(),
        packs=packs, per_sample=per_sample,
    )  # fmt: skip


def _training_set(
    records: RecordSet, processor: LlavaSkipProcessor, data: DataArguments, run: RunArguments, as_bytes: bool
) -> tuple[ConversationDataset, PackSampler | None]:
    lengths, most = None, data.max_tokens_per_batch
    if data.group_by_modality_length or most is not None:
        lengths = sample_lengths(records, processor, data.max_length, data.data_processes)
    if lengths is not None and most is not None:
        dataset = ConversationDataset(records, processor, data.max_length, as_bytes=as_bytes)
        return dataset, PackSampler(abs(lengths), most, run.layout.processes, run.seed)
    dataset = ConversationDataset(records, processor, data.max_length, lengths, as_bytes)
    step = run.per_device_train_batch_size * run.world_size
    if run.dataloader_drop_last and len(dataset) < step:
        raise UserError(
            f"--dataloader_drop_last true leaves no step: there are {len(dataset)} samples, and one takes {step}."
        )
    return dataset, None


def count_dropped(dropped: dict[str, Any] | None) -> int:
    """The number of records that were dropped, each with one finding or more."""
    return len({error["row"] for error in (dropped or {}).get("records", ())})


def check_dropped(output: Path, dropped: dict[str, Any] | None, overwrite: bool) -> None:
    """Refuse to continue a run with other records than it began with: its data order would be another one.

    Raises:
        UserError: other records are dropped now than when the run began.
    """
    if overwrite or not (output / RECORD).is_file():
        return
    record = output / DROPPED
    before = read_json(record) if record.is_file() else None
    if before != as_json(dropped):
        counts = [count_dropped(found) + count_dropped((found or {}).get("validation")) for found in (before, dropped)]
        raise UserError(
            f"OUTPUT {output} began with {counts[0]} dropped records, and now {counts[1]} would be: restore the data "
            "as it was to continue, or start again with another OUTPUT or --overwrite true."
        )


def check_same_records(run: Run) -> None:
    """Refuse processes that read other records than rank 0: their steps would be of other samples. Every rank calls it.

    Raises:
        UserError: names the first such process.
    """
    if isinstance(run.dataset, ConversationStream):
        return
    dropped = (run.dropped or {}).get("records", [])
    views = gather_object([(socket.gethostname(), len(run.dataset), dropped)])
    if different := [rank for rank, view in enumerate(views) if view[1:] != views[0][1:]]:
        seen = [
            f"rank {rank} on {views[rank][0]} reads {views[rank][1]} records and drops {len(views[rank][2])}"
            for rank in (different[0], 0)
        ]
        raise UserError(f"{', '.join(seen)}: DATA and IMAGES must be the same on all machines.")


def check_output(output: Path, arguments: dict[str, Any], overwrite: bool) -> None:
    """Refuse a folder that holds anything but this very run.

    Raises:
        UserError: says which arguments differ, or what else is in the folder.
    """
    if overwrite or not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"OUTPUT {output} is a file: give a folder.")
    record = read_record(output)
    if record is None:
        if any(path.name != LOCK for path in output.iterdir()):
            raise UserError(f"OUTPUT {output} holds other files: give an empty folder, or --overwrite true.")
        return
    before, now = _flat(identity(record)), _flat(identity(as_json(arguments)))
    if different := sorted(key for key in before | now if before.get(key) != now.get(key)):
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in different[:4])
        raise UserError(
            f"OUTPUT {output} holds another run ({changes}): give another OUTPUT, the same arguments to continue it, "
            "or --overwrite true to delete it."
        )


def _flat(nested: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{group}.{key}": value for group, values in nested.items() for key, value in values.items()}
