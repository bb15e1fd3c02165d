"""How time and memory grow with images, text and samples, and among presets with their FLOPs: fitted exponents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from eval.study.speed import tasks
from eval.study.speed.measuring import Rounds, exponent, peak_bytes, take_turns, timed, try_call
from eval.study.speed.page import MIB, STEPS, Row, Table
from eval.study.speed.subjects import Shape, Subject
from llava_skip_base.console import chart_label, figure

AXES = {"images": "images of a sample", "text": "text tokens of a sample", "samples": "samples of a batch"}
"""Fields of a `Shape` that grow, in words."""
PRESETS_AXIS = "FLOPs of the presets"
LIMIT = 1.1
"""The exponent up to which growth counts as linear."""
NOTES = (
    "Each axis grows by itself, from one sample with one image. An exponent b is that of the power law a * size^b that "
    "fits best: 1 is growth in proportion, and less where something costs the same at each size. Attention has a part "
    f"that grows with the square of a sample's length, in the FLOPs too. Above {LIMIT} is named in the last column.",
    "The last lines fit time and memory of the presets over their FLOPs.",
)


@dataclass(frozen=True)
class Growth:
    """What grows.

    Attributes:
        base: the shape whose fields grow one at a time.
        values: of each field of `AXES`, ascending.
        rounds: of each measurement.
    """

    base: Shape
    values: Mapping[str, tuple[int, ...]]
    rounds: Rounds = Rounds()


def measure_growth(subjects: Sequence[Subject], growth: Growth) -> list[Row]:
    """Time and memory of a training step and of a prefill, for each value of each axis and each model."""
    trainer = tasks.Trainer(subjects)
    rows = _measure(subjects, growth, "train_step", partial(_training, trainer))
    trainer.release()
    return rows + _measure(subjects, growth, "prefill", tasks.prefill)


def _training(trainer: tasks.Trainer, subject: Subject, shape: Shape) -> Callable[[], Any]:
    return tasks.training(subject, shape, trainer)


def _measure(
    subjects: Sequence[Subject], growth: Growth, kind: str, task: Callable[[Subject, Shape], Callable[[], Any]]
) -> list[Row]:
    rows: list[Row] = []
    for axis, values in growth.values.items():
        points = {
            f"{subject.name} {value}": (subject, value, replace(growth.base, **{axis: value}))
            for value in values
            for subject in subjects
        }
        calls = {label: task(subject, shape) for label, (subject, _, shape) in points.items()}
        peaks = {label: try_call(partial(peak_bytes, call, subjects[0].device)) for label, call in calls.items()}
        fitting = {label: call for label, call in calls.items() if not isinstance(peaks[label], str)}
        times = take_turns(
            {label: timed(kind, call, subjects[0].device) for label, call in fitting.items()},
            growth.rounds,
            f"{kind.replace('_', ' ')} by {axis}",
        )
        for label, (subject, value, shape) in points.items():
            found = times.get(label, peaks[label])
            if isinstance(found, str):
                rows.append({"measurement": "failed", "name": label, "reason": found})
                continue
            flops = subject.training_flops(shape) if kind == "train_step" else subject.prefill_flops(shape)
            row = {"axis": axis, "value": value, "measurement": kind, "name": subject.name, "flops": flops.total}
            row |= {"seconds": found[kind].minimum, "spread": found[kind].spread, "peak_bytes": peaks[label]}
            rows.append(row)
    return rows


def fit(rows: Sequence[Row]) -> list[Row]:
    """Exponents of time, memory and FLOPs: over each axis for each model, and among the models over their FLOPs."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["measurement"] != "failed":
            groups.setdefault((row["axis"], row["measurement"], row["name"]), []).append(row)
    fits = [_fit(axis, kind, name, own, "value") for (axis, kind, name), own in groups.items()]
    for kind in STEPS:
        first: dict[str, Row] = {}
        for row in rows:
            if row["measurement"] == kind and row["axis"] == "samples":
                first.setdefault(row["name"], row)
        if len({row["flops"] for row in first.values()}) > 1:
            fits.append(_fit(PRESETS_AXIS, kind, "all", list(first.values()), "flops"))
    return [fit for fit in fits if fit]


def _fit(axis: str, kind: str, name: str, rows: Sequence[Row], over: str) -> Row:
    if len(rows) < 2:
        return {}
    sizes = [row[over] for row in rows]
    found = {part: exponent(sizes, [row[part] for row in rows]) for part in ("seconds", "peak_bytes", "flops")}
    above = [part for part in ("seconds", "peak_bytes") if found[part] > LIMIT]
    return {"axis": axis, "measurement": kind, "name": name, **found, "above": above}


def growth_table(fits: Sequence[Row]) -> Table:
    """The exponents."""
    table = [["grows with", "measurement", "model", "time", "memory", "FLOPs", f"above {LIMIT}"]]
    for row in fits:
        numbers = [f"{row[name]:.2f}" for name in ("seconds", "peak_bytes", "flops")]
        above = ", ".join(row["above"]).replace("seconds", "time").replace("peak_bytes", "memory")
        table.append([AXES.get(row["axis"], PRESETS_AXIS), STEPS[row["measurement"]], row["name"], *numbers, above])
    return table


def draw_growth(rows: Sequence[Row], path: Path) -> None:
    """Time and memory over each axis, both axes logarithmic."""
    kinds = ("train_step", "prefill")
    parts = [(kind, name, scale) for kind in kinds for name, scale in (("seconds", 1000.0), ("peak_bytes", 1 / MIB))]
    axes_of = [axis for axis in AXES if any(row.get("axis") == axis for row in rows)]
    with figure(path, (4 * len(axes_of), 3 * len(parts)), nrows=len(parts), ncols=len(axes_of), squeeze=False) as grid:
        for line, (kind, name, scale) in zip(grid, parts, strict=True):
            for place, axis in zip(line, axes_of, strict=True):
                own = [row for row in rows if row.get("axis") == axis and row["measurement"] == kind]
                for model in dict.fromkeys(row["name"] for row in own):
                    points = [(row["value"], row[name] * scale) for row in own if row["name"] == model]
                    place.plot(*zip(*points, strict=True), marker="o", markersize=3, label=chart_label(model))
                unit = "ms" if name == "seconds" else "MiB beyond the weights"
                place.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel=f"{STEPS[kind]}, {unit}")
        grid[0][0].legend(fontsize=7)
