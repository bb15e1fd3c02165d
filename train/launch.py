"""Start a run's processes: `llava-skip train ...`, or `python -m train.launch [torchrun options] [-m MODULE] ...`.

Without `-m` or `--no-python`, all words are arguments of the run, and the environment says the rest: NPROC is the
number of processes on this machine (default: its GPUs, else 2), TORCHRUN has options of torchrun that join several
machines, DRY_RUN prints the command instead of running it. Signals of the cluster are passed on to the processes, and
torchrun shows no traceback of its own.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from llava_skip_base.console import one_message
from llava_skip_base.errors import UserError
from llava_skip_base.exits import EXPLAINED, KILLED, PREEMPTED, STOPPED_BY
from llava_skip_base.machine import usable_cores
from llava_skip_base.paths import checkout, embedded_tokenizer
from train.recipe.recipes import RECIPE, recipe_words, take_option, with_underscores
from train.resilience.exits import STOP_SIGNALS
from train.seeds import take_seeds, train_seeds

TAIL = 25
"""Lines of a failed process's log that are shown."""
_TORCHRUN = {"-m", "--module", "--no-python", "--no_python"}
"""One of these is in a command line of torchrun, and none in the arguments of a run."""
_HELP = {"-h", "--help", "--help-all", "--help_all"}
TOGETHER = 2
"""Seconds between the end of a process and that of another one that failed because of it; torchrun kills after 30."""
WORKER = ("train.train",) if sys.version_info >= (3, 11) else ("llava_skip", "train")  # 3.10 has no PYTHONSAFEPATH


def processes_here() -> int:
    """Processes on this machine: NPROC, else its GPUs, else 2.

    Raises:
        UserError: NPROC is no number above 0.
    """
    given = os.environ.get("NPROC")
    if not given:
        return torch.cuda.device_count() or 2
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"NPROC is {given!r}; it must be a number of processes, 1 or more.")
    return int(given)


def torchrun_words(words: list[str]) -> list[str]:
    """Torchrun's command line for the arguments of a run.

    Raises:
        UserError: NPROC is no number, or there is no such recipe.
    """
    if _HELP & set(words):
        from train.run import parse  # prints the help; takes seconds to import

        parse(words)
    options = shlex.split(os.environ.get("TORCHRUN") or "--standalone")
    processes = processes_here()
    recipe, others = take_option(with_underscores(words), RECIPE)
    names = {word.partition("=")[0] for word in others if word.startswith("--")}
    if recipe is not None:  # a mistake in it is one message, and the embedded data set is built before processes start
        if not embedded_tokenizer().exists():  # it may have to be built, which takes longer than these imports
            from train.arguments import KINDS
            from train.command_line import check_names

            check_names(KINDS, words)
        recipe_words(recipe, {name.removeprefix("--") for name in names}, processes=processes)
    device = [word for name, value in device_arguments().items() if name not in names for word in (name, value)]
    return [*options, "--nproc_per_node", str(processes), "-m", *WORKER, *words, *device]


def device_arguments() -> dict[str, str]:
    """Arguments of a run that follow from the machine."""
    if torch.cuda.is_available():
        return {"--bf16": "true", "--tf32": "true"}
    return {"--use_cpu": "true", "--dataloader_pin_memory": "false"}


def set_environment(processes: int) -> None:
    """What the processes need to know: when they were launched, where the project is, how many threads to use."""
    os.environ["LAUNCHED_AT"] = str(time.time())
    # A train.py in the current folder must not be taken for the project's.
    os.environ["PYTHONSAFEPATH"] = "1"
    if (root := checkout()) is not None:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))


class Forwarding:
    """Passes `STOP_SIGNALS` on to the processes and waits for them; torchrun would kill them after 30 seconds."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._forward)

    def _forward(self, number: int, frame: Any) -> None:
        self.asked = signal.Signals(number)
        processes = psutil.Process().children()
        for process in processes:
            process.send_signal(number)
        if not processes:  # nothing runs yet: the launcher is still looking for the other nodes
            raise SystemExit(PREEMPTED)


def show_log(failure: ProcessFailure) -> None:
    """The end of what a process wrote, if that went into a file (torchrun's --redirects)."""
    log = Path(failure.error_file).with_name("stderr.log")
    if log.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        sys.stderr.write("".join(f"{line}\n" for line in [f"the end of {log}:", *lines]))


def find_cause(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first; of those at the same moment one that was killed: the others fail because of it."""
    first = min(failure.timestamp for failure in failures.values())
    together = {rank: failure for rank, failure in failures.items() if failure.timestamp <= first + TOGETHER}
    killed = {rank: f for rank, f in together.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM}
    return min((killed or together).items(), key=lambda item: item[1].timestamp)


def explain(rank: int, failure: ProcessFailure) -> str:
    """What ended a process, in words."""
    if failure.exitcode >= 0:
        return f"error: rank {rank} ended with code {failure.exitcode}; its output is above."
    name = signal.Signals(-failure.exitcode).name
    hint = " (by the kernel for lack of memory, if by nobody else)" if name == "SIGKILL" else ""
    return f"error: rank {rank} was killed by {name}{hint}; the same command continues from the last checkpoint."


def main() -> None:
    """Start the processes; leave with the exit code of the first one that failed, or with `PREEMPTED`."""
    words = sys.argv[1:]
    if not _TORCHRUN & set(words):
        with one_message():
            seeds, words = take_seeds(words)
            if seeds and not _HELP & set(words):
                set_environment(processes_here())
                signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the run, whose end is waited for
                forwarding = Forwarding()
                code = train_seeds(words, seeds, lambda: forwarding.asked is not None)
                killed = forwarding.asked is not None and code == STOPPED_BY + forwarding.asked  # nothing saved yet
                raise SystemExit(PREEMPTED if killed else code)
            words = torchrun_words(words)
    if os.environ.get("DRY_RUN"):
        print(*(re.sub(r"([^\w@%+=:,./-])", r"\\\1", word) for word in [sys.executable, "-m", "train.launch", *words]))
        return
    set_environment(processes_here())
    launch(words)


def launch(words: list[str]) -> None:
    """Run torchrun's command line to its end."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    forwarding = Forwarding()
    try:
        run.main(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *words])
    except SignalException as stop:
        sys.stderr.write(
            f"error: stopped by {stop.sigval.name}; the same command continues from the last checkpoint.\n"
        )
        raise SystemExit(STOPPED_BY + stop.sigval) from None
    except ChildFailedError as error:
        rank, failure = find_cause(error.failures)
        if forwarding.asked and failure.exitcode == -forwarding.asked:  # it had nothing to save yet
            raise SystemExit(PREEMPTED) from None
        show_log(failure)
        if failure.exitcode not in EXPLAINED:
            sys.stderr.write(f"{explain(rank, failure)}\n")
        raise SystemExit(failure.exitcode if failure.exitcode > 0 else KILLED) from None


if __name__ == "__main__":
    main()
