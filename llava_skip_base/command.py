"""The one command: `llava-skip PROGRAM ...`, or `python -m llava_skip PROGRAM ...`, runs any program of the project.

The packages of the programs are named by strings, so the library does not import what is built on it.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module, metadata
from pathlib import Path
from typing import NoReturn

from llava_skip_base.exits import STOPPED_BY
from llava_skip_base.paths import checkout


@dataclass(frozen=True)
class Program:
    """A program: its module, which has a `main()` that reads `sys.argv`, and what it does in one line."""

    module: str
    summary: str


PROGRAMS: dict[str, Program] = {
    "train": Program("train.launch", "Train a model, one process for each GPU (--recipe NAME)."),
    "plan": Program("train.plan", "Hours, memory and FLOPs of a run before it, and which models fit a budget."),
    "reproduce": Program("train.reproduce", "Write the page of the paper's tables as commands (docs/reproduce.md)."),
    "validate-data": Program("train.validate_data", "Check a training data set, and list the faulty records."),
    "show-sample": Program("train.show_sample", "Show one record as the model is trained on it."),
    "bench-data": Program("train.bench_data", "Measure how fast a training data set is read."),
    "merge-lora": Program("train.merge_lora", "Merge a LoRA adapter into its model."),
    "convert": Program("llava_skip.convert", "Convert a checkpoint of LLaVA, llava-hf or the paper's code."),
    "extend": Program("llava_skip.extend", "Extend a chain-of-sight resampler to more scales."),
    "chat": Program("serve.chat", "Ask a model about images in the terminal."),
    "serve": Program("serve.server", "Answer chat completions of OpenAI's interface with a model (extra [serve])."),
    "demo": Program("serve.demo", "Open a page: chat with images, models side by side, what becomes of an image."),
    "eval": Program("eval.run", "Evaluate saved models on benchmarks."),
    "score": Program("eval.score", "Score saved predictions of any program."),
    "compare": Program("eval.compare", "Compare two results, or two models on all benchmarks, with intervals."),
    "power": Program("eval.study.power", "How large a difference a comparison can detect, before it is run."),
    "overview": Program("eval.overview", "Write the HTML overview of all results."),
    "analyze": Program("eval.study.analyze", "Measure on a checkpoint why skipping works and what it costs."),
    "tradeoff": Program("eval.tradeoff", "Draw score against FLOPs and time, for rivals at several budgets."),
    "bench": Program("eval.study.bench", "Measure time and memory of presets, their growth, or a GPU."),
    "costs": Program("eval.study.costs", "Write the table of FLOPs and cache sizes of all presets."),
    "conformance": Program("tests.conformance.__main__", "Compare the library with golden tensors (in a checkout)."),
    "data": Program("playground.data.build", "Build the embedded data set."),
}  # fmt: skip

_WORKER = "train.train"
"""What `train` runs in a process that torchrun or srun started."""


def usage() -> str:
    """The list of programs."""
    width = max(map(len, PROGRAMS))
    lines = [f"  {name:{width}}  {program.summary}" for name, program in PROGRAMS.items()]
    return "\n".join(
        ["usage: llava-skip PROGRAM [options]", "", *lines, "", "llava-skip PROGRAM --help lists a program's options."]
    )


def use_own_packages() -> None:
    """Let the packages of the programs be the project's, whatever the current folder has of these names."""
    here, root = Path.cwd(), Path(__file__).resolve().parent.parent
    others = [entry for entry in sys.path if Path(entry or ".").resolve() not in (here, root)]
    if checkout() is None:  # installed: its folder has all packages, which must not come before the standard library
        sys.path[:] = [*others, str(root), str(here)]
    else:
        sys.path[:] = [str(root), *others, str(here)]


def main() -> None:
    """Run the program that the command line names."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("--help", "-h", "help"):
        print(usage())
        return
    if name == "--version":
        print(metadata.version("llava-skip"))
        return
    name = name.replace("_", "-")
    if name not in PROGRAMS:
        hint = "".join(f" Did you mean {close}?" for close in get_close_matches(name, PROGRAMS, 1))
        _fail(f"there is no program {name!r}.{hint} llava-skip --help lists all programs.")
    use_own_packages()
    sys.argv = [f"llava-skip {name}", *arguments]
    module = _WORKER if name == "train" and "LOCAL_RANK" in os.environ else PROGRAMS[name].module
    if module.startswith("tests.") and not (Path(__file__).parent.parent / "tests").is_dir():
        _fail(f"{name} needs a checkout of the project; the installed package has no tests.")
    try:
        program = import_module(module)
    except KeyboardInterrupt:  # the libraries take seconds to import
        raise SystemExit(STOPPED_BY + signal.SIGINT) from None
    program.main()


def _fail(message: str) -> NoReturn:
    from llava_skip_base.console import fail  # typer and rich: the list of programs needs neither

    fail(message)


if __name__ == "__main__":
    main()
