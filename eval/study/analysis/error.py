"""The error of skipping as a part of the analysis: `bound` has the computation, this the batches, table and notes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.study.analysis import bound
from eval.study.analysis.batches import Batch
from eval.study.analysis.numbers import as_text
from llava_skip.modeling import LlavaSkipForConditionalGeneration

TITLE = "The error of skipping, bounded and measured"
DEFINITIONS = bound.DEFINITIONS


def measure(model: LlavaSkipForConditionalGeneration, batches: Sequence[Batch]) -> dict[str, Any]:
    """What `bound.measure` gives for the batches."""
    given = ({**batch.inputs_for(model), "last": batch.last, "answers": batch.answers} for batch in batches)
    return bound.measure(model, given)


def draw(result: dict[str, Any], folder: Path) -> list[str]:
    """The charts of `bound.draw`; the names of the files."""
    return [path.name for path in bound.draw(result, folder)]


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: medians in each layer; of errors over the samples, of what one FFN adds over the tokens."""
    bounded = result["left_out"] is None
    curves = ("measured", "local", "global") if bounded else ("measured",)
    groups = {"skipped": "skipped tokens", "text": "text behind"}
    headings = ["layer", *(f"{name}, {title}" for title in groups.values() for name in curves)]
    headings += [f"one FFN, {name}" for name in reversed(bound.ONE_LAYER)] if bounded else []
    rows = []
    for row in result["layers"]:
        cells = [as_text(row.get(kind, {}).get(name, {}).get("q50")) for kind in groups for name in curves]
        own = row.get("one_layer", {})
        cells += [as_text(own.get(name, {}).get("q50")) for name in reversed(bound.ONE_LAYER)] if bounded else []
        rows.append([str(row["layer"]), *cells])
    return headings, rows


def notes(result: dict[str, Any]) -> list[str]:
    """What skips, how far the distributions are apart, and how often a bound did not hold."""
    what = "the checkpoint's skipped tokens" if result["skipping"] == "of the checkpoint" else "all image tokens"
    kl = result["kl"]
    found = [
        f"With and without the FFN on {what}, same weights: KL of the first token of the answer {as_text(kl['mean'])} "
        f"nats (mean; median {as_text(kl['q50'])}, 95% below {as_text(kl['q95'])}; {kl['n']} samples with images)."
    ]
    if (answers := result["kl_answers"])["n"]:
        found.append(
            f"Over the {answers['n']} tokens of the answers: {as_text(answers['mean'])} nats (mean), median "
            f"{as_text(answers['q50'])}."
        )
    if result["left_out"] is not None:
        found.append(f"There are no bounds: {result['left_out']}")
    else:
        counts = ", ".join(f"{name} {count}" for name, count in result["violations"].items())
        found.append(f"Values above their bound (the local one is an estimate): {counts}.")
    return found
