"""Whether a device computes what a CPU computes in float32: logits, loss, gradients and answers of small models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eval.study.speed.page import Row, Table
from eval.study.speed.subjects import Shape, Subject, build_subjects
from llava_skip.configuration import IGNORE_INDEX

LIMITS = {"float32": 1e-3, "bfloat16": 5e-2}
"""The largest difference that is agreement, as a share of the largest logit or of the gradient's norm. One rounding to
bfloat16 is 2^-9, 0.2%; some tens of them follow each other."""
COMPARED = ("logits", "loss", "gradient")
SHAPE = Shape(samples=2, images=1, text=40)


def compare_with_cpu(presets: Sequence[str], device: str, size: str = "tiny") -> list[Row]:
    """A row for each preset and number format: the same weights and inputs on the device and, in float32, on a CPU.

    A format agrees whose differences are within `LIMITS`, or at most twice those that a CPU has in that format.
    """
    rows: list[Row] = []
    for preset in presets:
        expected = _outputs(_only(preset, size, "cpu", torch.float32))
        for dtype in (torch.float32, torch.bfloat16):
            differences = compare_outputs(expected, _outputs(_only(preset, size, device, dtype)))
            on_cpu = (
                0.0
                if dtype is torch.float32
                else _largest(compare_outputs(expected, _outputs(_only(preset, size, "cpu", dtype))))
            )
            row: Row = {"name": preset, "dtype": str(dtype).removeprefix("torch."), **differences, "on_cpu": on_cpu}
            row["agrees"] = within(differences, max(LIMITS[row["dtype"]], 2 * on_cpu))
            rows.append(row)
    return rows


def _largest(differences: dict[str, Any]) -> float:
    return max(differences[name] for name in COMPARED)


def within(differences: dict[str, Any], limit: float) -> bool:
    """Whether no difference is above a limit, or no number."""
    return all(differences[name] <= limit for name in COMPARED)  # NaN is below nothing; `max` can pass over it


def _only(preset: str, size: str, device: str, dtype: torch.dtype) -> Subject:
    """The model of one preset, with the weights that a CPU draws, whatever the device."""
    subjects = build_subjects([preset], size, "cpu", torch.float32, stock=False)
    subject = next(own for own in subjects if own.name == preset)
    subject.model.to(device=device, dtype=dtype)
    return subject


def _outputs(subject: Subject) -> dict[str, Tensor]:
    inputs = subject.inputs(SHAPE)
    model = subject.model.train()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # else float32 would be 10 bits of mantissa
        outputs = model(**inputs, logits_to_keep=0)
        outputs.loss.backward()
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight
    supervised = inputs["labels"] != IGNORE_INDEX
    found = {"logits": outputs.logits[supervised], "loss": outputs.loss, "gradient": weight.grad}
    model.eval()
    prompt = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    found["answer"] = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, -4:]
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def compare_outputs(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Any]:
    """Differences of two runs, as shares of what is expected."""

    def off(name: str) -> float:
        mine, theirs = found[name].double(), expected[name].double()
        return float((mine - theirs).abs().max() / theirs.abs().max())

    gradient = (found["gradient"].double() - expected["gradient"].double()).norm()
    same = found["logits"].argmax(dim=-1) == expected["logits"].argmax(dim=-1)
    return {
        "logits": off("logits"),
        "loss": off("loss"),
        "gradient": float(gradient / expected["gradient"].double().norm()),
        "same_first_choice": float(same.double().mean()),
        "same_answer": bool((found["answer"] == expected["answer"]).all()),
    }


def agreement_table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    table = [["model", "format", "logits", "loss", "gradient", "same likeliest token", "same answer", "agrees"]]
    for row in rows:
        cells = [f"{row[name]:.1e}" for name in ("logits", "loss", "gradient")] + [f"{row['same_first_choice']:.1%}"]
        cells += ["yes" if row["same_answer"] else "no", "yes" if row["agrees"] else "no"]
        table.append([row["name"], row["dtype"], *cells])
    return table
