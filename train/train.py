"""The entry point of stage 1 and of supervised fine-tuning, in every process of a run; `train.launch` starts them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from train.resilience.exits import leave  # before the libraries, so that its exit handler is the last one to run

if __name__ == "__main__":  # before imports that take seconds: Ctrl-C ends each process without a traceback of its own
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from accelerate.utils import gather_object
from transformers import set_seed

from llava_skip.ends import learn_ends
from llava_skip.model_card import write_card
from llava_skip.per_sample import set_attention_per_sample
from llava_skip.vision.clip import ClipTower
from llava_skip_base.console import print_error
from llava_skip_base.errors import UserError
from llava_skip_base.exits import NOT_SAVED, PREEMPTED, TRAINING_ERROR, USER_ERROR
from llava_skip_base.files import read_json, write_json
from train.benchmarks import Benchmarks, benchmark_scores
from train.data import ConversationDataset, RecordError
from train.data.features import FeatureCollator, FeatureShards, FeatureWriter
from train.planning.checkpointing import settle_checkpointing
from train.recipe.features import features_folder, say_size, tower_dtype
from train.recipe.liger import use_liger
from train.recipe.model import make_trainable_model
from train.recipe.plan import show_plan
from train.reporting.callbacks import keep_reports_in, show_no_bars
from train.reporting.card import run_facts
from train.reporting.result import draw_loss, show_result
from train.resilience.finite import NotFinite
from train.resilience.preemption import Preemption
from train.resilience.resume import CheckpointError
from train.resilience.run_folder import RESULT, RunFolder
from train.resilience.watchdog import Watchdog
from train.run import Run, check, check_same_records, count_dropped, parse
from train.trainer import SkipTrainer
from train.validation import Validation

FIND_RECORDS = (
    " llava-skip validate-data with the same arguments finds all such records; training then refuses them at its "
    "start, or drops them (--drop_faulty true)."
)
"""What to do about a record that failed only when it was read."""
OUT_OF_MEMORY = (
    "a batch did not fit into the memory, although --activation_checkpointing auto expected it to: the same command "
    "with --activation_checkpointing true continues the run, and takes less."
)


def train(run: Run, checkpoint: Path | None = None) -> bool:
    """Load or make the model, train it, and leave model, processor, metrics and loss curve in the output folder.

    Returns:
        Whether the run is finished; it is not if a signal asked it to leave.

    Raises:
        UserError: the model cannot be loaded, or a record that was not checked before the run cannot be trained on.
        CheckpointError: a checkpoint could not be written.
        NotFinite: the loss, the gradient or the weights are NaN or infinite.
    """
    arguments = run.arguments
    set_seed(arguments.seed)
    _settle(run)
    keep_reports_in(run.output)
    show_no_bars(arguments)
    model = make_trainable_model(run.model_arguments, arguments, run.config)
    if run.per_sample:
        set_attention_per_sample(model)
    if arguments.use_liger_kernel:
        use_liger(model, arguments)
    learn_ends(model, run.processor)
    features = _stored_features(run, model)
    preemption, watchdog = Preemption(), Watchdog(arguments.hang_timeout_seconds)
    trainer = SkipTrainer(
        model=model,
        args=arguments,
        train_dataset=run.dataset,
        eval_dataset=run.validation,
        data_collator=run.collator if features is None else FeatureCollator(run.collator, features.shards),
        processing_class=run.processor,
        callbacks=[preemption, watchdog],
        resolved=run.resolved,
        validation=Validation(run.validation, run.collator, arguments) if run.validation else None,
        features=features,
        packs=run.packs,
    )
    if arguments.eval_benchmarks:
        trainer.add_callback(Benchmarks(arguments, trainer.log, watchdog.mark, preemption))
    started = time.perf_counter()
    outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if preemption.agreed:
        return False
    exported = trainer.export()
    counts: dict[str, Any] = trainer.throughput()
    if features is not None:
        counts["vision_features"] = _feature_counts(features)
    if arguments.process_index == 0:
        counts |= {"total_seconds": time.perf_counter() - started}
        _report(run, trainer, counts, outcome, exported)
    return True


def _settle(run: Run) -> None:
    """Decide what the arguments leave open, and look whether there is room; rank 0 says it. Every rank calls it."""
    said = [settle_checkpointing(run.model_arguments, run.arguments, run.config, run.longest)]
    if run.packs is not None:
        said.append(str(run.packs))
    if run.features is not None and isinstance(run.dataset, ConversationDataset):
        said.append(say_size(run.features, run.dataset.records, run.config, tower_dtype(run.arguments)))
    if run.arguments.process_index == 0:
        sys.stderr.write("".join(f"{line}\n" for line in said if line))


def _stored_features(run: Run, model: Any) -> FeatureWriter | None:
    """What reads and writes the features of the run's tower; damaged shards are said."""
    if run.features is None:
        return None
    tower = next(module for module in model.modules() if isinstance(module, ClipTower))
    shards = FeatureShards(
        features_folder(run.features, tower, run.config, run.processor, run.model_arguments.attn_implementation)
    )
    if run.arguments.process_index == 0:
        damaged = f"; {len(shards.damaged)} shards are damaged, and what they held is made again" * bool(shards.damaged)
        sys.stderr.write(f"{shards.folder} holds the features of {len(shards):,} crops{damaged}\n")
    return FeatureWriter(shards, run.arguments.process_index)


def _feature_counts(features: FeatureWriter) -> dict[str, int]:
    """Crops that were read, computed and damaged, of all ranks."""
    ranks = gather_object([features.counts])
    return {name: sum(counts[name] for counts in ranks) for name in features.counts}


def _report(
    run: Run, trainer: SkipTrainer, counts: dict[str, Any], outcome: Any, exported: str | None
) -> None:  # fmt: skip
    history, validation = ([e for e in trainer.state.log_history if name in e] for name in ("loss", "eval_loss"))
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
        "dropped": count_dropped(run.dropped) or int(counts["faulty"]),
        "dropped_validation": count_dropped((run.dropped or {}).get("validation")),
        "unread_columns": run.unread,
        "history": history,
        "validation": validation,
        "benchmarks": benchmark_scores(run.output),
        "exported": exported or "the last step",
        **counts,
    }
    if run.resolved["training"]["activation_checkpointing"] == "auto":
        result["activation_checkpointing"] = run.arguments.activation_checkpointing
    if run.config.reduction is not None:
        result["reduction"] = run.config.reduction
    write_json(run.output / RESULT, result, sort_keys=True)
    draw_loss(history, validation, run.output / "loss.png", f"{preset}: training loss")
    write_card(run.output, run.config, run_facts(run.resolved, result, run.model_arguments.lora_enable))
    show_result(result, run.output)


def silence_libraries() -> None:
    """Drop warnings that users cannot act on: DeepSpeed and PEFT use old names, a line for each call and process."""
    for pattern in (r"`torch\.distributed\.\w+` is deprecated", "`is_gradient_checkpointing` is deprecated"):
        warnings.filterwarnings("ignore", pattern, FutureWarning)


def _tell(error: Exception) -> None:
    """Say what ended the run: rank 0 for all; the others wait 30 s, and report only if they are still alive then."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's, when rank 0 has ended; in training it only asks
        time.sleep(30)
    print_error(f"rank {rank} on {socket.gethostname()}: {error}" if rank else error)


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
            _settle(run)
            if rank == 0:
                samples = len(run.dataset) if isinstance(run.dataset, ConversationDataset) else None
                show_plan(run.model_arguments, run.arguments, run.config, run.parts, run.resolved, samples, run.packs)
            return 0
        check_same_records(run)
        folder = RunFolder(run.arguments, run.resolved, run.dropped)
        finished = folder.is_finished()
        checkpoint = None if finished else folder.open()
    except UserError as error:
        _tell(error)
        return USER_ERROR
    if finished:
        if rank == 0:
            show_result(read_json(run.output / RESULT), run.output)
            sys.stderr.write(f"{run.output} holds this run, finished: nothing to do. --overwrite true repeats it.\n")
        return 0
    return 0 if _train_or_explain(run, checkpoint) else PREEMPTED


def _train_or_explain(run: Run, checkpoint: Path | None) -> bool:
    try:
        return train(run, checkpoint)
    except torch.OutOfMemoryError:
        before = run.resolved["training"]["activation_checkpointing"]
        if before == "auto" and run.arguments.activation_checkpointing is False:
            print_error(OUT_OF_MEMORY)
        raise  # its traceback says what did not fit
    except RecordError as error:  # of one rank
        print_error(f"{error}{FIND_RECORDS}")
        code = USER_ERROR
    except CheckpointError as error:
        print_error(error)
        code = NOT_SAVED
    except NotFinite as error:
        (_tell if error.of_all_ranks else print_error)(error)
        code = TRAINING_ERROR
    except UserError as error:  # of all ranks
        _tell(error)
        code = USER_ERROR
    os._exit(code)  # the other ranks block in a collective: a clean shutdown would hang


if __name__ == "__main__":
    main()
