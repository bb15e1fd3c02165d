"""`--seeds 3` or `--seeds 42,43,44`: the same run once for each seed, in OUTPUT/seed-N, one after the other.

Each is a run of its own, so the same command continues an interrupted one and does not repeat the finished ones.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_skip_base.console import make_table, output_console, print_next, print_text
from llava_skip_base.errors import UserError
from llava_skip_base.exits import PREEMPTED, STOPPED_BY
from llava_skip_base.files import read_json, write_json
from llava_skip_base.paths import checkpoints, shown
from train.recipe.recipes import RECIPE, read_recipe, take_option, with_folders, with_underscores

SEEDS = "--seeds"
FIRST = 42
"""The seed of a run that is given none, and the first one of `--seeds COUNT`."""
MOST = 20
"""Runs that a number alone may ask for; a larger one is more likely meant as a seed."""
LARGEST = 2**32 - 1
_RESULT, _RECORD, _SUMMARY = "train_result.json", "run.json", "seeds.json"


def take_seeds(words: Sequence[str]) -> tuple[list[int] | None, list[str]]:
    """The seeds that a command line asks for, None if it does not, and the other words.

    Raises:
        UserError: they are no seeds, or a single seed is given as well.
    """
    text, others = take_option(with_underscores(words), SEEDS)
    if text is None:
        return None, list(words)
    if take_option(others, "--seed")[0] is not None:
        raise UserError(f"{SEEDS} gives each run its seed: leave out --seed, or give all seeds to {SEEDS}.")
    parts = [part.strip() for part in text.split(",") if part.strip()]
    numbers = [int(part) for part in parts if part.isascii() and part.isdecimal() and len(part) < 12]
    if not numbers or len(numbers) < len(parts) or max(numbers) > LARGEST:
        raise UserError(f"{SEEDS} is {text!r}; expected a number of runs, such as 3, or seeds, such as 42,43,44.")
    if "," in text:
        if doubled := sorted({number for number in numbers if numbers.count(number) > 1}):
            raise UserError(f"{SEEDS} has {', '.join(map(str, doubled))} more than once; give different seeds.")
        return numbers, others
    if not 1 <= numbers[0] <= MOST:
        raise UserError(
            f"{SEEDS} {text} asks for {text} runs, and at most {MOST} can be asked for so; for the seed {text} write "
            f"--seed {text}, for several seeds put commas between them."
        )
    return list(range(FIRST, FIRST + numbers[0])), others


def default_output(preset: str | None) -> str:
    """The folder of a run that is given none."""
    return shown(checkpoints() / (preset or "finetuned"))


def output_of(words: Sequence[str]) -> Path:
    """The folder that a command line, or its recipe, gives a run.

    Raises:
        UserError: it holds a run already, and not one for each seed.
    """
    source, own = take_option(with_underscores(words), RECIPE)
    recipe = read_recipe(source) if source else {}
    named, preset = (take_option(own, f"--{name}")[0] or recipe.get(name) for name in ("output_dir", "preset"))
    output = Path(with_folders(named) if named else default_output(preset))
    if (output / _RECORD).exists():
        raise UserError(f"OUTPUT {output} holds a run of one seed: give another OUTPUT for the runs of {SEEDS}.")
    return output


def train_seeds(words: Sequence[str], seeds: Sequence[int], stopped: Callable[[], bool] = lambda: False) -> int:
    """Train once for each seed; the exit code of the first run that does not end well, else 0.

    Args:
        words: the command line without `--seeds`.
        seeds: of the runs.
        stopped: whether a signal has asked to stop; the next run is then not started.
    """
    output = output_of(words)
    _, others = take_option(with_underscores(words), "--output_dir")
    folders = [output / f"seed-{seed}" for seed in seeds]
    for number, (seed, folder) in enumerate(zip(seeds, folders, strict=True), start=1):
        print_text(f"run {number} of {len(seeds)}: seed {seed}, {folder}")
        own = ["--seed", str(seed), "--output_dir", str(folder)]
        code = subprocess.call([sys.executable, "-m", "llava_skip", "train", *others, *own])
        if code:
            return code if code > 0 else STOPPED_BY - code
        if stopped() and number < len(seeds):  # the signal came as this run ended
            return PREEMPTED
    if all((folder / _RESULT).is_file() for folder in folders):  # a dry run leaves none
        _summarise(output, seeds, [read_json(folder / _RESULT) for folder in folders])
    return 0


def _summarise(output: Path, seeds: Sequence[int], results: Sequence[dict[str, Any]]) -> None:
    losses = [float(result["final_loss"]) for result in results]
    mean = statistics.fmean(losses)
    deviation = statistics.stdev(losses) if len(losses) > 1 else math.nan
    runs = [
        {"seed": seed, "folder": f"seed-{seed}", "final_loss": loss, "steps": result["steps"]}
        for seed, loss, result in zip(seeds, losses, results, strict=True)
    ]
    spread = {"mean": mean, "deviation": deviation if len(losses) > 1 else None}
    write_json(output / _SUMMARY, {"runs": runs, "final_loss": spread})
    rows = [(run["seed"], run["steps"], f"{run['final_loss']:.4f}") for run in runs]
    table = make_table(f"{len(seeds)} seeds -> {output}", ("seed", "steps", "final loss"), rows)
    table.add_section()
    table.add_row("mean and standard deviation", "", f"{mean:.4f} ± {deviation:.4f}")
    output_console().print(table)
    print_next(f"llava-skip eval --model {shown(output)} evaluates each seed")
