"""Converts a checkpoint under ZeRO into DeepSpeed's universal form, which any number of processes and stage can read.

`python -m train.resilience.universal FOLDER STAGE` converts `FOLDER`, a `global_step<N>`, for a run under ZeRO-STAGE,
into the folder beside it that has `UNIVERSAL` after its name. It is a process of its own, so that the memory it takes
is free again when training starts.
"""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from llava_skip_base.errors import UserError
from llava_skip_base.files import read_text, write_text
from llava_skip_base.machine import usable_cores
from train.resilience.loading import only_data

UNIVERSAL = "_universal"
LATEST, LATEST_UNIVERSAL = "latest", "latest_universal"
"""Files of a checkpoint with the name of DeepSpeed's folder in it."""
OPTIMIZER = "zero/optimizer_state.pt"
"""What is common to all parameters, in the converted folder."""
_MOMENTS = ("fp32", "exp_avg", "exp_avg_sq")
"""Files of a parameter in the converted folder."""
_INNER = "optimizer_state_dict"
_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""Where stages below 3, and stage 3, look for the counts of a checkpoint."""
_WEIGHTS = ("module", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params")
"""What else is in these files, and in a universal form is not read."""


def convert(checkpoint: Path, stage: int) -> None:
    """Make the universal form of a checkpoint, inside it, for a run under a stage. Only one process calls this.

    Raises:
        UserError: the conversion failed, for example for want of room; the checkpoint is as it was.
    """
    remove(checkpoint)
    source = checkpoint / read_text(checkpoint / LATEST).strip()
    command = [sys.executable, "-m", "train.resilience.universal", str(source), str(stage)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        remove(checkpoint)
        last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "no message")
        raise UserError(
            f"{checkpoint} cannot be converted for another number of processes or ZeRO stage: {last.strip()}. Continue "
            "it as it was written, or make room: the conversion takes about three times the size of its global_step."
        )
    write_text(checkpoint / LATEST_UNIVERSAL, f"{source.name}{UNIVERSAL}")


def remove(checkpoint: Path) -> None:
    """Delete the universal form of a checkpoint, whole or in part."""
    (checkpoint / LATEST_UNIVERSAL).unlink(missing_ok=True)
    for folder in checkpoint.glob(f"*{UNIVERSAL}"):
        shutil.rmtree(folder)


def restore_groups(checkpoint: Path, optimizer: Any) -> None:
    """Give each group of parameters its own rates, decay and count of steps.

    Under ZeRO-3 DeepSpeed gives all groups the values of the first, and one count that each of them would raise.

    Args:
        checkpoint: that was converted and read.
        optimizer: that DeepSpeed has wrapped.
    """
    saved = _load(checkpoint / read_text(checkpoint / LATEST_UNIVERSAL) / OPTIMIZER)
    for group, values in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({name: value for name, value in values.items() if name != "params"})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _load(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _convert(source: Path, stage: int) -> None:
    from deepspeed.checkpoint import ds_to_universal

    target = source.with_name(source.name + UNIVERSAL)
    workers = min(4, usable_cores())
    ds_to_universal.main(
        Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=workers,
            num_merge_workers=workers,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    (target.parent / LATEST_UNIVERSAL).unlink()  # `convert` writes it when all is done
    _complete(target, stage)


def _complete(target: Path, stage: int) -> None:
    """Let a stage read what the conversion of another has left: they agree on the tensors, not on what is around them.

    Also leaves out what no stage reads: the weights in half precision, and rank 0's share of the optimizer's state.
    """
    state = _load(target / OPTIMIZER)
    under_3 = state.pop(_INNER, None)
    state.pop("fp32_flat_groups", None)
    parameters = sorted(folder.parent for folder in (target / "zero").glob("*/exp_avg.pt"))
    if under_3 is None:
        steps = (parameters[0] / "step.pt",)
        step = next((_load(file) for file in steps if file.is_file()), None)
    else:
        step = under_3["state"][0].get("step")
    if under_3 is not None and stage < 3:
        for folder in parameters:
            for name in _MOMENTS:
                torch.save({"param": _load(folder / f"{name}.pt")}, folder / f"{name}.pt")
            if step is not None:
                torch.save(step, folder / "step.pt")
    state[_INNER] = {"state": {0: {"step": step}}, "param_groups": state["param_groups"]}
    models = sorted(target.glob("*_model_states.pt"))
    model = _load(models[0])
    state["ds_version"] = model["ds_version"]
    torch.save(state, target / OPTIMIZER)
    for file in models:
        file.unlink()
    torch.save({key: value for key, value in model.items() if key not in _WEIGHTS}, target / _MODEL_FILES[stage == 3])


def main() -> None:
    """Convert what the command line names."""
    multiprocessing.set_start_method("fork")  # DeepSpeed's workers are then held to data, too
    source, stage = sys.argv[1:]
    with only_data(deepspeed=True):
        _convert(Path(source), int(stage))


if __name__ == "__main__":
    main()
