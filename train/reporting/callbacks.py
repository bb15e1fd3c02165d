"""Where metrics go: a line of the console, a JSON line of `train_log.jsonl`, and transformers' own reporters."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets.utils import disable_progress_bars
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging as transformers_logging

from llava_skip_base.errors import UserError
from llava_skip_base.files import read_text, write_text

if TYPE_CHECKING:
    from train.arguments import RunArguments

LOG = "train_log.jsonl"
_CONSOLE = {
    "loss": "loss {:7.4f}",
    "learning_rate": "rate {:.2e}",
    "tokens_per_second": "{:9,.0f} tokens/s",
    "skipped_ffn_share": "skipped {:5.1%}",
    "mfu": "MFU {:5.1%}",
}
"""Metrics of a log line, and how they are shown."""
_PACKAGES = ("wandb", "tensorboard")


def check_reporters(arguments: RunArguments) -> None:
    """Check before any weight is loaded that the packages of --report_to are installed and wandb has an account.

    Raises:
        UserError: one of them is not, or is unknown; the message says what to install or to set.
    """
    for name in arguments.report_to:
        if name in _PACKAGES and importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name} needs a package: pip install {name}.")
    ready = get_available_reporting_integrations()
    if missing := [name for name in arguments.report_to if name not in ready]:
        raise UserError(f"--report_to {missing[0]} is unknown, or its package is not installed; here are {ready}.")
    online = os.environ.get("WANDB_MODE", "online") == "online"
    if "wandb" in arguments.report_to and online and os.environ.get("RANK", "0") == "0":
        _check_account()


def _check_account() -> None:
    import wandb

    try:
        known = wandb.login(prompt=False)
    except wandb.Error as error:
        raise UserError(f"--report_to wandb: {error} WANDB_MODE=offline needs no network.") from error
    if not known:
        raise UserError("--report_to wandb has no account here: set WANDB_MODE=offline, or run `wandb login`.")


def keep_reports_in(output: Path) -> None:
    """Have wandb and TensorBoard write into the run's folder, unless the environment says otherwise."""
    os.environ.setdefault("WANDB_DIR", str(output))
    os.environ.setdefault("WANDB_PROJECT", "llava-skip")
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output / "tensorboard"))


def show_no_bars(arguments: RunArguments) -> None:
    """Turn progress bars of libraries off where they would fill a log file: on other ranks, and without a terminal."""
    if arguments.process_index or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        disable_progress_bars()


class LogLine(TrainerCallback):
    """Prints each log entry as one aligned line: step, loss, rate, tokens/s, skipped share, elapsed and left."""

    def __init__(self) -> None:
        self._began = (0, time.monotonic())

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the step and the time."""
        self._began = (state.global_step, time.monotonic())

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Print the line; above the bar where there is one."""
        if not state.is_world_process_zero or not logs:
            return
        width = len(str(state.max_steps))
        if "eval_loss" in logs:
            tqdm.write(f"step {state.global_step:{width}}/{state.max_steps} | validation loss {logs['eval_loss']:7.4f}")
        elif scores := [f"{name[5:]} {value:.1f}" for name, value in logs.items() if name.startswith("eval_")]:
            tqdm.write(f"step {state.global_step:{width}}/{state.max_steps} | {' | '.join(scores)}")
        if "loss" not in logs:
            return
        first, start = self._began
        elapsed = time.monotonic() - start
        left = elapsed / max(1, state.global_step - first) * (state.max_steps - state.global_step)
        parts = [f"step {state.global_step:{width}}/{state.max_steps}"]
        parts += [form.format(logs[name]) for name, form in _CONSOLE.items() if name in logs]
        parts.append(f"{_clock(elapsed)} elapsed, {_clock(left)} left")
        tqdm.write(" | ".join(parts))


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Progress(ProgressCallback):
    """transformers' progress bar without its log lines."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Nothing: `LogLine` prints them."""


class JsonLines(TrainerCallback):
    """Appends every log entry to `train_log.jsonl` as one line, in one write."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Delete the lines after the checkpoint that the run resumes from: these steps are repeated."""
        path = Path(args.output_dir) / LOG
        if state.is_world_process_zero and path.is_file():
            lines = [line for line in read_text(path).splitlines() if _step(line) <= state.global_step]
            write_text(path, "".join(f"{line}\n" for line in lines))

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Append the entry."""
        if state.is_world_process_zero:
            line = json.dumps({"step": state.global_step, **(logs or {})}) + "\n"
            with (Path(args.output_dir) / LOG).open("ab", buffering=0) as file:
                file.write(line.encode())


def _step(line: str) -> float:
    """The step of a line of the log; a line that was cut off counts as later than all."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
