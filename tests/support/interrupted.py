"""A run of seconds, and what must be the same after any interruption."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file

from llava_skip import LlavaSkipForConditionalGeneration
from tests.support.conversations import byte_tokenizer
from tests.support.small_models import small_config

ROOT = Path(__file__).parents[2]
RECORDS = 22  # with 4 in a step: five steps and a half an epoch


def write_inputs(folder: Path, mixed: bool = True, dropout: float = 0.1) -> list[str]:
    """A model with dropout, records with and (`mixed`) without images; the arguments that train it on them."""
    config = small_config(vocab_size=400, attention_dropout=dropout, num_hidden_layers=2)
    config.image_token_index = 3
    LlavaSkipForConditionalGeneration(config).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    records = []
    for index in range(RECORDS):
        question, answer = f"What is {index}?", f"It is {index * 7 % 10}."
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        record = {"id": str(index), "conversations": turns}
        if index % 3 or not mixed:
            Image.new("RGB", (20, 16), (index * 11, 90, 255 - index)).save(folder / f"{index}.png")
            record["image"] = f"{index}.png"
            turns[0]["value"] = f"<image>\n{question}"
        records.append(record)
    (folder / "data.json").write_text(json.dumps(records))
    return [
        *("--model", str(folder / "model"), "--template", "v1", "--data", str(folder / "data.json")),
        *("--images", str(folder), "--use_cpu", "true", "--dataloader_pin_memory", "false", "--disable_tqdm", "true"),
        *("--max_steps", "13", "--logging_steps", "2", "--save_steps", "3", "--learning_rate", "1e-3"),
        *("--per_device_train_batch_size", "4"),
    ]  # fmt: skip


def environment(**variables: str) -> dict[str, str]:
    """The environment of a training process on the CPU."""
    return os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **variables}


class Attempts:
    """Makes attempts at a run, see `attempts.py`."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("attempts.py"))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes)

    def __call__(
        self,
        arguments: list[str],
        function: str = "",
        call: int = 1,
        strike: str = "SIGKILL",
        rank: int = 0,
        processes: int = 1,
    ) -> dict:
        """`code` and `output` of an attempt that is struck, at one rank, at a call of a function."""
        struck = [rank, function, call, strike] if function else None
        request = {"arguments": arguments, "strike": struck, "processes": processes}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


MEASURED = ("skipped_ffn_share", "tokens_per_second", "samples_per_second", "data_wait_seconds", "memory_peak_gib")


def outcome(output: Path) -> dict:
    """What an interruption must not change: the loss curve, the sums, the weights."""
    result = json.loads((output / "train_result.json").read_text())
    state = json.loads(next(output.glob("checkpoint-*/trainer_state.json")).read_text())
    return {
        "history": [{k: v for k, v in entry.items() if k not in MEASURED} for entry in result["history"]],
        "sums": {key: result[key] for key in ("steps", "mean_loss", "samples", "rows", "supervised", "ffn_rows")},
        "logged": [(entry["step"], entry["epoch"], entry.get("loss")) for entry in state["log_history"]],
        "weights": load_file(output / "model.safetensors"),
    }


TRAIN = ("-m", "tests.support.strikes")


def launch(
    arguments: list[str],
    *options: str,
    strike: tuple | None = None,
    program: tuple[str, ...] = TRAIN,
    processes: int = 2,
) -> subprocess.Popen:
    """Processes of a run; `strike` is a rank, a function, the number of its call, and a signal."""
    command = [sys.executable, "-m", "train.launch", "--standalone", "--nproc_per_node", str(processes), *options]
    return subprocess.Popen(
        [*command, *program, *arguments],
        cwd=ROOT,
        env=environment(**({"STRIKE": json.dumps(strike)} if strike else {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launch_and_wait(arguments: list[str], *options: str, **how: Any) -> dict:
    """`code` and `output` of the processes, see `launch`."""
    process = launch(arguments, *options, **how)
    output = process.communicate(timeout=300)[0]
    return {"code": process.returncode, "output": output}
