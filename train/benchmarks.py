"""Benchmarks while training: `llava-skip eval` evaluates each checkpoint, as a process of its own.

It reads the checkpoint alone, so it is the same under every ZeRO stage, and training does not notice it. The other
processes wait for a file, not in a collective, whose time limit an evaluation would exceed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState

from llava_skip_base.console import print_error
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json, read_text, write_json

if TYPE_CHECKING:
    from train.arguments import ModelArguments, RunArguments
    from train.resilience.preemption import Preemption

FOLDER = "benchmarks"
"""Folder in the run's, with the results of `llava-skip eval` and one `checkpoint-N.json` for each checkpoint."""
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "LAUNCHED_AT")
"""How the variables begin that belong to a process of the run; an evaluation starts processes of its own."""
_SECONDS = 0.5
"""Between two looks at what is waited for."""


def command(run: RunArguments, *more: str) -> list[str]:
    """The command line of an evaluation."""
    limit = [] if run.eval_benchmarks_limit is None else ["--limit", str(run.eval_benchmarks_limit)]
    data = [word for file in run.eval_benchmarks_data or () for word in ("--data", file)]
    return [sys.executable, "-m", "llava_skip", "eval", "--benchmarks", str(run.eval_benchmarks), *data, *limit, *more]


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_OF_TORCHRUN)}


def check_benchmarks(model: ModelArguments, run: RunArguments) -> None:
    """Let an evaluation check its benchmarks and their data; one process calls it, before a model loads.

    Raises:
        UserError: with the evaluation's own message.
    """
    if run.eval_benchmarks is None:
        if run.eval_benchmarks_data or run.eval_benchmarks_limit is not None:
            raise UserError(
                "--eval_benchmarks_data and --eval_benchmarks_limit need --eval_benchmarks, such as mmstar."
            )
        return
    if model.lora_enable:
        raise UserError(
            "--eval_benchmarks evaluates whole models, and with --lora_enable a checkpoint is an adapter: leave it out."
        )
    if run.process_index == 0:
        words = command(run, "--dry-run")
        checked = subprocess.run(words, env=_environment(), capture_output=True, text=True, check=False)
        if checked.returncode:
            said = checked.stderr.strip().splitlines() or ["it gave no reason"]
            raise UserError(f"--eval_benchmarks {run.eval_benchmarks}: {said[-1].removeprefix('error: ')}")


def benchmark_scores(output: Path) -> list[dict[str, Any]]:
    """Of each evaluated checkpoint: `step`, and `scores` by benchmark (None: it failed)."""
    found = [read_json(file) for file in (output / FOLDER).glob("checkpoint-*.json")]
    return sorted(({name: entry[name] for name in ("step", "scores")} for entry in found), key=lambda e: e["step"])


class Benchmarks(TrainerCallback):
    """Evaluates each checkpoint, when it was written.

    Args:
        run: the arguments.
        log: Trainer's, called by every process with the scores as `eval_<benchmark>`.
        mark: notes progress for the watchdog.
        preemption: what the cluster asks for ends an evaluation; the next start of the run continues it.
    """

    def __init__(
        self,
        run: RunArguments,
        log: Callable[[dict[str, float]], None],
        mark: Callable[[str], None],
        preemption: Preemption,
    ) -> None:
        self._run, self._log, self._mark, self._preemption = run, log, mark, preemption
        self._folder = Path(run.output_dir) / FOLDER
        self._first = run.process_index == 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate the checkpoint that the run continues from, if that was not finished."""
        if state.global_step == 0:
            return
        file = self._file(state.global_step)
        if self._first and file.is_file() and read_json(file)["interrupted"]:
            file.unlink()
        if dist.is_initialized():
            dist.barrier()
        if not file.is_file():
            self._evaluate(state.global_step)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate the checkpoint."""
        if not self._file(state.global_step).is_file():
            self._evaluate(state.global_step)

    def _file(self, step: int) -> Path:
        return self._folder / f"checkpoint-{step}.json"

    def _evaluate(self, step: int) -> None:
        """Evaluate on the first process, and log the scores on all."""
        if self._first:
            write_json(self._file(step), self._outcome(step))
        while not self._file(step).is_file():
            self._wait(step)
        scores = read_json(self._file(step))["scores"]
        self._log({f"eval_{name}": score for name, score in scores.items() if score is not None})

    def _wait(self, step: int) -> None:
        self._mark(f"evaluating step {step}")
        time.sleep(_SECONDS)

    def _outcome(self, step: int) -> dict[str, Any]:
        """Run the evaluation to its end, or until the run is asked to leave."""
        name = f"checkpoint-{step}"
        words = command(self._run, "--model", str(self._folder.parent / name), "--output", str(self._folder))
        self._folder.mkdir(exist_ok=True)
        log, interrupted = self._folder / f"{name}.log", False
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(words, env=_environment(), stdout=file, stderr=subprocess.STDOUT)
            while process.poll() is None:
                if self._preemption.is_asked and not interrupted:
                    interrupted = True
                    process.terminate()
                self._wait(step)
        if process.returncode and not interrupted:
            tail = "\n".join(read_text(log).splitlines()[-5:])
            print_error(f"the benchmarks of step {step} ended with code {process.returncode}; {log} ends with:\n{tail}")
        return {"step": step, "interrupted": interrupted, "scores": self._scores(name)}

    def _scores(self, name: str) -> dict[str, float | None]:
        """Score of each benchmark of `--eval_benchmarks`, from its results."""
        results = {path.parent.parent.name: path for path in self._folder.glob(f"*/{name}/results.json")}
        asked = [word.strip() for word in str(self._run.eval_benchmarks).split(",")]
        names = sorted(results) if asked == ["all"] else asked
        return {each: read_json(results[each])["score"] if each in results else None for each in names}
