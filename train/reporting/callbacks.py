"""Where metrics go: a line of the console, a JSON line of `train_log.jsonl`, and transformers' own reporters."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from llava_skip.errors import UserError
from train.arguments import RunArguments
from train.reporting.result import write_text

LOG = "train_log.jsonl"
_CONSOLE = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "epoch")
_PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard"}


def check_reporters(arguments: RunArguments) -> None:
    """What --report_to names must be installed, and wandb must be able to work, before any weight is loaded.

    Raises:
        UserError: says what to install or to set.
    """
    for name in arguments.report_to:
        if name in _PACKAGES and importlib.util.find_spec(_PACKAGES[name]) is None:
            raise UserError(f"--report_to {name} needs a package: pip install {_PACKAGES[name]}.")
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


class BriefProgress(ProgressCallback):
    """The progress bar, with the metrics that fit on a line."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print some of the metrics above the bar."""
        if logs and "loss" in logs:
            shown = {name: logs[name] for name in _CONSOLE if name in logs}
            super().on_log(args, state, control, logs=shown, **kwargs)


class JsonLines(TrainerCallback):
    """Appends every log entry to `train_log.jsonl` as one line, in one write."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Drop what a broken run wrote behind the checkpoint that is continued: these steps are made again."""
        path = Path(args.output_dir) / LOG
        if state.is_world_process_zero and path.is_file():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= state.global_step]
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
    """The step of a line of the log; a line that was cut off belongs to no step that counts."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
