"""Writes docs/embedded.md from what `scripts/compare_embedded.sh` left behind."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoConfig

import llava_skip  # noqa: F401  registers the configuration
from llava_skip.files import read_json
from llava_skip.flops import image_cost

HEADER = """# The embedded run, dense against skipping

Made by `bash scripts/compare_embedded.sh` ({device}, {processes} processes, torch {torch}): the same seed and data for
each, and for models of one architecture the same steps. MMStar and MMBench are the embedded sets ({mmstar} and {mmbench}
questions about held-out handwriting; guessing reaches at most 30% on MMStar), scored by the official rules.

| preset | MMStar | MMBench (circular) | steps | final loss | step time (ms) | FLOPs of a prefill | rows a picture | rows in the cache |
|---|---|---|---|---|---|---|---|---|
"""

FOOTER = """
The step time includes encoding the samples, the optimizer and the communication. FLOPs are those of the language model
for one picture and {text} rows of text, relative to the dense model of the same architecture. At this size most rows
are text and most of the time is not the FFN of visual tokens, so the times say little; [results.md](results.md) has them at real proportions.
"""

TEXT_ROWS = 30
"""Rows of text in the FLOP column: about one question of the embedded set."""


def main(
    checkpoints: Annotated[Path, typer.Option(help="Folder with a trained model for each preset.")],
    results: Annotated[Path, typer.Option(help="Folder with results of each benchmark and preset.")],
    presets: Annotated[str, typer.Option(help="Presets, separated by blanks, the dense one of an architecture first.")],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("docs/embedded.md"),
) -> None:
    """Write the table."""
    lines: list[str] = []
    dense: dict[str, Any] = {}
    for name in presets.split():
        run = read_json(checkpoints / name / "train_result.json")
        scores = {b: read_json(results / b / name / "results.json") for b in ("mmstar", "mmbench")}
        config = AutoConfig.from_pretrained(checkpoints / name)
        cost = image_cost(config, text_tokens=TEXT_ROWS)
        flops = cost.prefill_flops / dense.setdefault(config.front_end, cost.prefill_flops)
        lines.append(
            f"| `{name}` | {scores['mmstar']['score']:.1f}% | {scores['mmbench']['score']:.1f}% | {run['steps']} "
            f"| {run['final_loss']:.3f} | {1000 * run['seconds'] / run['steps']:.0f} | {flops:.0%} "
            f"| {cost.tokens} | {cost.cache_tokens} |"
        )
    header = HEADER.format(
        device=f"{platform.machine()} {run['device'].split(':')[0].upper()}",
        processes=run["processes"],
        torch=scores["mmstar"]["versions"]["torch"],
        mmstar=scores["mmstar"]["counts"]["questions"],
        mmbench=scores["mmbench"]["counts"]["questions"],
    )
    output.write_text(header + "\n".join(lines) + "\n" + FOOTER.format(text=TEXT_ROWS), encoding="utf-8")
    typer.echo(f"{output}")


if __name__ == "__main__":
    typer.run(main)
