"""Every preset whole: a training step, a prefill, an answer, decoding, their memory, beside FLOPs and stock LLaVA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from eval.study.speed import tasks
from eval.study.speed.measuring import Measured, Rounds, Spread, peak_bytes, take_turns, timed, try_call
from eval.study.speed.page import Row
from eval.study.speed.subjects import STOCK, Shape, Subject, cache_bytes
from llava_skip.step_flops import StepFlops, block_products


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        shape: of the batch of training and prefill.
        rounds: of each measurement.
        batches: samples that decode at once.
        steps: decode steps of one call, and new tokens of an answer.
        budget: bytes of cache that decide one more batch for each model; None: what four samples of the model with
            the largest cache take.
        parts: measurements, of `PARTS`.
    """

    shape: Shape = Shape()
    rounds: Rounds = Rounds()
    batches: tuple[int, ...] = (1, 4, 16)
    steps: int = 8
    budget: int | None = None
    parts: tuple[str, ...] = ("train", "prefill", "answer", "decode", "images")


@dataclass
class Outcome:
    """Rows of all measurements, and the cache of one sample of each model."""

    rows: list[Row] = field(default_factory=list)
    caches: list[Row] = field(default_factory=list)

    def add(
        self,
        subjects: Sequence[Subject],
        found: Mapping[str, Mapping[str, Spread] | str],
        flops: Callable[[Subject, str], StepFlops | None] | None,
        samples: Callable[[Subject], int],
        peaks: Mapping[str, int] | None = None,
        calls: int = 1,
    ) -> None:
        """Add the times of some measurements.

        Args:
            subjects: the models, in the order of the rows.
            found: what `take_turns` gave.
            flops: of a model and a measurement; None where products are not what takes the time. All of them are the
            ideal's; without the optimizer's, they are what a second is said to compute.
            samples: of a model's batch.
            peaks: bytes beyond the weights, by name.
            calls: how many calls one measured time has.
        """
        for subject in subjects:
            own = found.get(subject.name, {})
            if isinstance(own, str):
                self.rows.append({"measurement": "failed", "name": subject.name, "reason": own})
                continue
            for kind, times in own.items():
                row: Row = {"measurement": kind, "name": subject.name, "reference": subject.reference}
                row |= {"samples": samples(subject), "seconds": times.minimum / calls, "spread": times.spread}
                row["all_seconds"] = [seconds / calls for seconds in times.seconds]
                if flops is not None and (work := flops(subject, kind)) is not None:
                    row |= {"flops": work.total, "tflops_a_second": work.model / row["seconds"] / 1e12}
                if peaks is not None:
                    row["peak_bytes"] = peaks[subject.name]
                self.rows.append(row)

    def compare(self) -> None:
        """Divide the time of a sample by that of the dense model, and the FLOPs too: the ideal."""
        known = {(row["measurement"], row["name"]): row for row in self.rows if row["measurement"] != "failed"}
        for row in known.values():
            dense = known.get((row["measurement"], row["reference"]))
            if dense is None:
                continue
            samples = dense["samples"] / row["samples"]
            row["ratio"] = row["seconds"] / dense["seconds"] * samples
            if row["name"] != STOCK and "flops" in row:
                row["flop_ratio"] = row["flops"] / dense["flops"] * samples
                row["over_ideal"] = row["ratio"] / row["flop_ratio"]


def measure_whole(subjects: Sequence[Subject], plan: Plan) -> Outcome:
    """Measure all parts of a plan; the models take turns in each."""
    outcome = Outcome()
    for part in plan.parts:
        PARTS[part](subjects, plan, outcome)
    outcome.compare()
    return outcome


def _turns(
    calls: Mapping[str, Callable[[], Any]], kind: str, plan: Plan, device: torch.device, memory: bool = True
) -> tuple[dict[str, dict[str, Spread] | str], dict[str, int]]:
    """Times of calls by a model's name, and the memory of a first one, which is not timed."""
    first = {name: try_call(partial(peak_bytes, call, device) if memory else call) for name, call in calls.items()}
    failed = {name: reason for name, reason in first.items() if isinstance(reason, str)}
    left = {name: timed(kind, call, device) for name, call in calls.items() if name not in failed}
    found = take_turns(left, plan.rounds, kind.replace("_", " "))
    return found | failed, {name: first[name] for name in left}


def _train(subjects: Sequence[Subject], plan: Plan, outcome: Outcome) -> None:
    trainer, shape = tasks.Trainer(subjects), plan.shape
    calls = {subject.name: tasks.training(subject, shape, trainer) for subject in subjects}
    found, peaks = _turns(calls, "train_step", plan, subjects[0].device)
    outcome.add(subjects, found, lambda s, _: s.training_flops(shape), lambda _: shape.samples, peaks)
    trainer.release()


def _prefill(subjects: Sequence[Subject], plan: Plan, outcome: Outcome) -> None:
    calls = {subject.name: tasks.prefill(subject, plan.shape) for subject in subjects}
    found, peaks = _turns(calls, "prefill", plan, subjects[0].device)
    outcome.add(subjects, found, lambda s, _: s.prefill_flops(plan.shape), lambda _: plan.shape.samples, peaks)


def _answer(subjects: Sequence[Subject], plan: Plan, outcome: Outcome) -> None:
    """One sample through `generate`, host included."""
    shape = Shape(1, plan.shape.images, plan.shape.text)
    calls: dict[str, Measured] = {s.name: tasks.answer(s, shape, plan.steps) for s in subjects}
    first = {name: try_call(call) for name, call in calls.items()}  # it prepares what later ones find ready
    failed = {name: reason for name, reason in first.items() if isinstance(reason, str)}
    calls = {name: call for name, call in calls.items() if name not in failed}

    def flops(subject: Subject, kind: str) -> StepFlops | None:
        return subject.prefill_flops(shape) if kind == "first_token" else None

    outcome.add(subjects, {**take_turns(calls, plan.rounds, "answer"), **failed}, flops, lambda _: 1)


def _decode(subjects: Sequence[Subject], plan: Plan, outcome: Outcome) -> None:
    """Tokens a second at several batches, and at as many samples as a budget of memory holds."""
    shape = Shape(1, plan.shape.images, plan.shape.text)
    prompts = {subject.name: try_call(tasks.prefill(subject, shape)) for subject in subjects}
    if failed := {name: reason for name, reason in prompts.items() if isinstance(reason, str)}:
        outcome.add(subjects, failed, None, lambda _: 1)
        subjects = [subject for subject in subjects if subject.name not in failed]
        prompts = {subject.name: prompts[subject.name] for subject in subjects}
    if not subjects:
        return
    sizes = {name: cache_bytes(prompt.past_key_values) for name, prompt in prompts.items()}
    for name, (stored, held) in sizes.items():
        outcome.caches.append({"name": name, "stored_bytes": stored, "held_bytes": held})
    budget = plan.budget or 4 * max(stored for stored, _ in sizes.values())
    fitting = {name: max(1, budget // stored) for name, (stored, _) in sizes.items()}
    choices = {f"decode_{batch}": dict.fromkeys(sizes, batch) for batch in plan.batches}
    for kind, batches in {**choices, "decode_budget": fitting}.items():
        made = {
            own.name: try_call(partial(tasks.Decoding, own, prompts[own.name], batches[own.name], plan.steps))
            for own in subjects
        }
        too_many = {name: reason for name, reason in made.items() if isinstance(reason, str)}
        calls = {name: call for name, call in made.items() if name not in too_many}
        found, _ = _turns(calls, kind, plan, subjects[0].device, memory=False)
        outcome.add(subjects, {**found, **too_many}, None, partial(_of, batches), calls=plan.steps)


def _of(batches: Mapping[str, int], subject: Subject) -> int:
    return batches[subject.name]


def _images(subjects: Sequence[Subject], plan: Plan, outcome: Outcome) -> None:
    """Tower to blocks, and the merge alone: what of a whole step is not the language model."""
    own = [subject for subject in subjects if subject.name != STOCK]
    shape = plan.shape
    for kind, task in (("images", tasks.seeing), ("merge", tasks.merging)):
        made = {subject.name: task(subject, shape) for subject in own}
        calls = {name: call for name, call in made.items() if call is not None}
        found, peaks = _turns(calls, kind, plan, own[0].device)
        outcome.add(own, found, partial(_image_flops, shape), lambda _: shape.samples, peaks)


def _image_flops(shape: Shape, subject: Subject, kind: str) -> StepFlops:
    flops, images = subject.prefill_flops(shape), shape.samples * shape.images
    if kind == "merge":
        merge, _ = block_products(subject.config, images, images * subject.config.most_crops)
        return replace(flops, tower=0, projector=merge.forward, decoder=0, head=0)
    return replace(flops, decoder=0, head=0)


PARTS: dict[str, Callable[[Sequence[Subject], Plan, Outcome], None]] = {
    "train": _train,
    "prefill": _prefill,
    "answer": _answer,
    "decode": _decode,
    "images": _images,
}


def dtype_on(device: str) -> torch.dtype:
    """The number format that is measured: bfloat16 on a GPU."""
    return torch.float32 if device == "cpu" else torch.bfloat16
