"""Writes docs/embedded.md from the results of `scripts/compare_embedded.sh`."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoConfig

import llava_skip  # noqa: F401  registers the configuration
from eval.showing.charts import draw_bars
from llava_skip.flops import image_cost
from llava_skip_base.console import chart_label, figure, print_text, program
from llava_skip_base.files import read_json, write_text
from llava_skip_base.paths import home, shown

HEADER = """# The embedded run, dense against skipping

Made by `bash scripts/compare_embedded.sh` ({device}, {processes} processes, torch {torch}): the same seed and data for
each, and for models of one architecture the same steps. MMStar and MMBench are the embedded sets ({mmstar} and {mmbench}
questions about held-out handwriting; guessing reaches at most 30% on MMStar), scored by the official rules.

| preset | MMStar | MMBench (circular) | steps | final loss | step time (ms) | FLOPs of a prefill | tokens of an image | tokens in the cache |
|---|---|---|---|---|---|---|---|---|
"""

FOOTER = """
The step time includes encoding the samples, the optimizer and the communication. FLOPs are those of the language model
for one image and {text} text tokens, relative to the dense model of the same architecture. At this size most tokens
are text and most of the time is not the FFN of visual tokens, so the times say little; [results.md](results.md) has them at real proportions.
"""

TITLES = {"mmstar": "MMStar", "mmbench": "MMBench (circular)"}
TEXT_TOKENS = 30
"""Text tokens in the FLOP column: about one question of the embedded set."""


def run(
    checkpoints: Annotated[Path, typer.Option(help="Folder with a trained model for each preset.")],
    results: Annotated[Path, typer.Option(help="Folder with results of each benchmark and preset.")],
    presets: Annotated[str, typer.Option(help="Presets, separated by blanks, the dense one of an architecture first.")],
    output: Annotated[Path | None, typer.Option(help="The page to write; docs/embedded.md by default.")] = None,
) -> None:
    """Write the table."""
    output = output or home() / "docs" / "embedded.md"
    lines: list[str] = []
    dense: dict[str, int] = {}
    names = presets.split()
    trained = {name: read_json(checkpoints / name / "train_result.json") for name in names}
    scored: dict[str, dict[str, float]] = {}
    for name in names:
        run = trained[name]
        scores = {b: read_json(results / b / name / "results.json") for b in TITLES}
        scored[name] = {b: result["score"] for b, result in scores.items()}
        config = AutoConfig.from_pretrained(checkpoints / name)
        cost = image_cost(config, text_tokens=TEXT_TOKENS)
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
    write_text(output, header + "\n".join(lines) + "\n" + FOOTER.format(text=TEXT_TOKENS))
    draw([trained[name] for name in names], [scored[name] for name in names], output.with_suffix(".png"))
    print_text(f"Open {shown(output)}; the chart is {shown(output.with_suffix('.png'))}.")


def draw(runs: list[dict[str, Any]], scores: list[dict[str, float]], path: Path) -> None:
    """The losses, and next to them the scores of each benchmark."""
    with figure(path, (10, 3.6), ncols=2) as (left, right):
        for run in runs:
            steps = [entry["step"] for entry in run["history"]]
            left.plot(
                steps, [entry["loss"] for entry in run["history"]], label=chart_label(run["preset"]), linewidth=1.2
            )
        groups = {title: [own[name] for own in scores] for name, title in TITLES.items()}
        draw_bars(right, [run["preset"] for run in runs], groups)
        left.set(xlabel="step", ylabel="loss (nats a token)", yscale="log", title="training on the embedded images")
        left.grid(alpha=0.3)
        right.set(ylim=(0, 110), ylabel="% right", title="held-out handwriting")
        right.legend(loc="lower right")


def main() -> None:
    """Run the command line."""
    program(run)


if __name__ == "__main__":
    main()
