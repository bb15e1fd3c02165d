"""One model several ways: attention implementations, and caches of `generate`, of which a GPU can replay one kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from eval.study.speed import tasks
from eval.study.speed.measuring import Measured, Rounds, Spread, clock, take_turns, try_call
from eval.study.speed.page import Row, Table
from eval.study.speed.subjects import Shape, Subject

EXPECTED = (ImportError, ValueError, RuntimeError, NotImplementedError)
"""What an implementation that a device, an installation or a model does not have may raise."""
REFERENCE = "sdpa"


def compare_attention(
    subjects: Sequence[Subject], implementations: Sequence[str], shape: Shape, rounds: Rounds
) -> list[Row]:
    """Training step, prefill, and the largest difference of a prefill's logits to those with `sdpa`."""
    rows: list[Row] = []
    for subject in subjects:
        logits: dict[str, Any] = {}
        for name in dict.fromkeys((REFERENCE, *implementations)):
            logits[name] = try_call(partial(_logits, subject, name, shape), EXPECTED)
        usable = [name for name in implementations if not isinstance(logits[name], str)]
        times = {kind: _times(subject, usable, kind, shape, rounds) for kind in ("train_step", "prefill")}
        for name in implementations:
            if name not in usable:
                rows.append({"name": subject.name, "attention": name, "reason": logits[name]})
                continue
            row: Row = {"name": subject.name, "attention": name}
            for kind, found in times.items():
                own = found[name]
                row[kind] = own if isinstance(own, str) else own[kind].minimum
            if not isinstance(reference := logits[REFERENCE], str):
                row["difference"] = float((logits[name] - reference).abs().max() / reference.abs().max())
            rows.append(row)
        subject.model.set_attn_implementation(REFERENCE)
    return rows


def _logits(subject: Subject, implementation: str, shape: Shape) -> torch.Tensor:
    subject.model.set_attn_implementation(implementation)
    return tasks.prefill(subject, shape)().logits.float()


def _times(
    subject: Subject, implementations: Sequence[str], kind: str, shape: Shape, rounds: Rounds
) -> dict[str, dict[str, Spread] | str]:
    """Times of each implementation; they take turns, which changes only a word in the configuration."""
    trainer = tasks.Trainer([subject]) if kind == "train_step" else None
    call = tasks.prefill(subject, shape) if trainer is None else tasks.training(subject, shape, trainer)
    made = {name: _switched(subject, name, kind, call) for name in implementations}
    warm = {name: try_call(own, EXPECTED) for name, own in made.items()}
    failed = {name: reason for name, reason in warm.items() if isinstance(reason, str)}
    usable = {name: own for name, own in made.items() if name not in failed}
    found = take_turns(usable, rounds, f"{subject.name}, {kind.replace('_', ' ')}")
    if trainer is not None:
        trainer.release()
    return found | failed


def _switched(subject: Subject, implementation: str, kind: str, call: Callable[[], Any]) -> Measured:
    now = clock(subject.device)

    def measured() -> dict[str, float]:
        subject.model.set_attn_implementation(implementation)
        start = now()
        call()
        return {kind: now() - start}

    return measured


CACHES: Mapping[str, Mapping[str, Any]] = {"growing": {}, "static": {"cache_implementation": "static"}}
"""Caches by name, as options of `generate`. Where the device is a GPU, transformers compiles decode steps over a static
one and replays them as CUDA graphs."""


def compare_caches(
    subjects: Sequence[Subject], batches: Sequence[int], shape: Shape, new_tokens: int, rounds: Rounds
) -> list[Row]:
    """Tokens a second of `generate` with each cache; the first two calls compile and capture."""
    rows: list[Row] = []
    for subject in subjects:
        for samples in batches:
            calls = {
                name: tasks.answer(subject, Shape(samples, shape.images, shape.text), new_tokens, **options)
                for name, options in CACHES.items()
            }
            warm = {name: [try_call(call, EXPECTED) for _ in range(2)][-1] for name, call in calls.items()}
            failed = {name: reason for name, reason in warm.items() if isinstance(reason, str)}
            usable = {name: call for name, call in calls.items() if name not in failed}
            found = failed | take_turns(usable, rounds, f"{subject.name}, {samples} at once")
            for name in CACHES:
                own = found[name]
                row: Row = {"name": subject.name, "cache": name, "samples": samples}
                if isinstance(own, str):
                    row["reason"] = own
                else:
                    row["tokens_a_second"] = samples / own["next_token"].minimum
                    row["first_token"] = own["first_token"].minimum
                rows.append(row)
    return rows


def attention_table(rows: Sequence[Row]) -> Table:
    """Attention implementations for people."""
    table = [["model", "attention", "training step ms", "prefill ms", f"difference to {REFERENCE}", ""]]
    for row in rows:
        times = [_milliseconds(row.get(kind)) for kind in ("train_step", "prefill")]
        difference = f"{row['difference']:.1e}" if "difference" in row else "-"
        reasons = [row.get("reason"), *(row.get(kind) for kind in ("train_step", "prefill"))]
        reason = next((text for text in reasons if isinstance(text, str)), "")
        table.append([row["name"], row["attention"], *times, difference, reason])
    return table


def cache_table(rows: Sequence[Row]) -> Table:
    """Caches of `generate` for people."""
    table = [["model", "samples", "cache", "first token ms", "tokens/s", ""]]
    for row in rows:
        speed = f"{row['tokens_a_second']:.1f}" if "tokens_a_second" in row else "-"
        cells = [_milliseconds(row.get("first_token")), speed, row.get("reason", "")]
        table.append([row["name"], str(row["samples"]), row["cache"], *cells])
    return table


def _milliseconds(value: Any) -> str:
    return f"{1000 * value:.1f}" if isinstance(value, float) else "-"
