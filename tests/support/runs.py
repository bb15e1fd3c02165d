"""Real training runs for tests: processes, DeepSpeed on the CPU, the embedded digits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from llava_skip_base.files import read_json
from train.resilience.run_folder import RunFolder
from train.run import check, parse
from train.train import train as train_here

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "VIRTUAL_ENV": sys.prefix,
    "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def run(*command: str, **variables: str) -> subprocess.CompletedProcess:
    """A command in the repository's folder, to its end."""
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=600
    )  # fmt: skip


FIXED = ["--use_cpu", "true", "--dataloader_pin_memory", "false", "--output_dir"]


def train(output: Path, *arguments: str, processes: int = 1, **variables: str) -> dict:
    """Train to the end; what `train_result.json` says. One process is this one, several are launched."""
    if processes == 1:
        with mock.patch.dict(os.environ, variables):
            checked = check(*parse([*FIXED, str(output), *arguments]))
            train_here(checked, RunFolder(checked.arguments, checked.resolved, checked.dropped).open())
        return read_json(output / "train_result.json")
    return train_many({output: list(arguments)}, processes, **variables)[0]


def train_many(runs: dict[Path, list[str]], processes: int, **variables: str) -> list[dict]:
    """Train several runs one after the other in the same processes; arguments by output folder."""
    commands = json.dumps([[*FIXED, str(output), *arguments] for output, arguments in runs.items()])
    launch = ["-m", "train.launch", "--standalone", f"--nproc_per_node={processes}", "-m", "tests.support.many"]
    result = run(sys.executable, *launch, commands, **variables)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return [read_json(output / "train_result.json") for output in runs]


def losses(result: dict) -> list[float]:
    """The loss of each logged step."""
    return [entry["loss"] for entry in result["history"]]
