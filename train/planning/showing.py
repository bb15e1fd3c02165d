"""A plan as a table, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_skip_base.console import chart_label, figure, make_table, output_console


def training_rows(found: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each variant: tokens of an image and a sample, FLOPs, hours, memory, and whether it fits."""
    rows: list[tuple[str, ...]] = []
    for one in found:
        cost, memory = one["training"], one["training"]["memory"]
        rows.append((
            one["name"], f"{one['inference']['tokens']:,}", f"{cost['tokens_a_sample']:,.0f}",
            f"{cost['flops'] / cost['steps'] / cost['samples_per_step'] / 1e12:.2f}", f"{cost['steps']:,}",
            f"{cost['hours']:.1f}", f"{cost['mfu']:.0%}", f"{memory['mean_batch_peak']:.0f}", f"{memory['peak']:.0f}",
            f"{memory['activations']:.0f}",
            "yes" if memory["fits"] else "no: an image is cut" if cost["image_is_cut"] else "no",
        ))  # fmt: skip
    return rows


TRAINING = ("training", "tokens of an image", "of a sample", "TFLOPs a sample", "steps", "hours", "MFU",
            "GiB, mean batch", "longest", "of them activations", "fits")  # fmt: skip
INFERENCE = ("answering", "tokens", "in attention", "in the FFN", "in the cache", "prefill TFLOPs", "prefill ms",
             "cache MiB an image", "requests at once")  # fmt: skip


def inference_rows(found: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each variant: the four numbers of an image, prefill and cache."""
    rows: list[tuple[str, ...]] = []
    for one in found:
        cost = one["inference"]
        numbers = (cost[name] for name in ("tokens", "attention_tokens", "ffn_tokens", "cache_tokens"))
        rows.append((
            one["name"], *(f"{number:,.0f}" for number in numbers), f"{cost['prefill_flops'] / 1e12:.2f}",
            f"{cost['prefill_ms']:.0f}", f"{cost['cache_mib_an_image']:.1f}", f"{cost['requests']:,}",
        ))  # fmt: skip
    return rows


def show(plan: dict[str, Any]) -> None:
    """Print what the plan assumes and its tables."""
    console = output_console()
    facts = [(name, value) for name, value in plan["assumptions"].items()]
    console.print(make_table("plan", ("", ""), facts))
    found = plan["variants"]
    if "training" in found[0]:
        console.print(make_table(None, TRAINING, training_rows(found), right=len(TRAINING) - 1))
    console.print(make_table(None, INFERENCE, inference_rows(found), right=len(INFERENCE) - 1))


def draw(plan: dict[str, Any], path: Path) -> None:
    """Bars of hours and memory of each variant, with the limits; of prefill alone where nothing is trained."""
    found, names = plan["variants"], [chart_label(one["name"]) for one in plan["variants"]]
    places = range(len(found))
    with figure(path, size=(9, 1.2 + 0.42 * len(found)), ncols=2, sharey=True) as (left, right):
        trained = "training" in found[0]
        times = [one["training"]["hours"] if trained else one["inference"]["prefill_ms"] for one in found]
        left.barh(places, times)
        left.set_xlabel("hours of training" if trained else "milliseconds of a prefill")
        limit = plan["budgets"]["hours" if trained else "ms"]
        if limit is not None:
            left.axvline(limit, color="black", linewidth=1)
        if trained:
            start = [0.0] * len(found)
            for part in ("weights", "gradients", "optimizer", "activations"):
                sizes = [one["training"]["memory"][part] for one in found]
                right.barh(places, sizes, left=start, label=part)
                start = [a + b for a, b in zip(start, sizes, strict=True)]
            right.axvline(found[0]["training"]["memory"]["available"], color="black", linewidth=1)
            right.set_xlabel("GiB of a GPU; line: available")
            right.legend(fontsize=7)
        else:
            right.barh(places, [one["inference"]["cache_mib_an_image"] for one in found])
            right.set_xlabel("MiB of an image in the cache")
        left.set_yticks(places, names)
        left.invert_yaxis()
