"""Writes docs/costs.md: what an image costs with each preset at each size, from the configurations alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.decoder import build_language_model
from llava_skip.flops import image_cost
from llava_skip.head_rows import HeadRows
from llava_skip.presets import PRESETS, SIZES, dense_preset, preset_config
from llava_skip.routing import Route
from llava_skip.step_flops import StepFlops, prompt_load, step_flops
from llava_skip_base.console import print_text, program
from llava_skip_base.files import write_text
from llava_skip_base.paths import home, shown

TEXT_TOKENS = 100

HEADER = f"""# What an image costs

Made by `llava-skip costs`, from the configurations alone. Tokens are the image tokens of one image (for LLaVA-HD, with
the most crops). The cache is that of all layers in bfloat16, after the prefill. FLOPs are those of a prefill of the
image and {TEXT_TOKENS} tokens of text with the head on the last token, and their share of the dense model with the same
front end (`llava`, `llava-hd` or `cos`). torch's FlopCounterMode counts the same number on the meta device, at the true
widths, for every line.

The second table of a size has the whole model. The step is one of training on one image and the same text, forward and
backward, tower frozen, half of the text supervised, without activation checkpointing; its parts are those of the
forward. The prefill is that of the first table with all that comes before the language model. The last column is the
step with activation checkpointing, which runs the decoder layers once more. `llava-skip bench` measures how near the
time comes to these shares ([speed.md](speed.md)); `llava-skip plan` has hours and memory ([plan.md](plan.md)).
"""

HEADINGS = (
    "preset", "retained", "skipped", "tokens", "through the FFN", "in the cache", "cache (MiB)", "prefill TFLOPs",
    "of dense",
)  # fmt: skip
COLUMNS = f"""
## {{size}}

| {" | ".join(HEADINGS)} |
|{"---|" * len(HEADINGS)}
"""

WHOLE_HEADINGS = (
    "preset", "tower", "projector, merging, summaries", "decoder", "head", "backward", "step TFLOPs", "step of dense",
    "prefill TFLOPs", "prefill of dense", "checkpointed step of dense",
)  # fmt: skip
WHOLE_COLUMNS = f"""
| {" | ".join(WHOLE_HEADINGS)} |
|{"---|" * len(WHOLE_HEADINGS)}
"""


def counted_flops(config: LlavaSkipConfig, text_tokens: int) -> int:
    """What torch counts for a prefill of one image and `text_tokens` tokens of text, without front end and head."""
    text, skip = config.text_config, config.skip_config
    tokens = config.image_seq_length + text_tokens
    with torch.device("meta"):
        model = build_language_model(text).eval()
        embeddings = torch.empty(1, tokens, text.hidden_size)
        mask = torch.empty(1, 1, tokens, tokens)  # given, since making one looks at values
        ffn = torch.empty(tokens - skip.num_skipping, dtype=torch.long) if skip else None
    head = HeadRows(text.num_hidden_layers - 1, number=1)
    route = Route(ffn_tokens=ffn, layers=skip.layers if skip else None, head=head)
    model.set_attn_implementation("eager")  # torch does not count its fused attention kernel for CPUs
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False, route=route)
    return counter.get_total_flops()


def training_step(config: LlavaSkipConfig, checkpointing: bool = False) -> StepFlops:
    """FLOPs of a training step on one image and `TEXT_TOKENS` tokens of text, with the tower frozen."""
    load = prompt_load(config, TEXT_TOKENS, head_tokens=TEXT_TOKENS // 2)
    return step_flops(config, load, ("multi_modal_projector", "summary", "language_model"), checkpointing)


def whole_line(preset: str, size: str) -> str:
    """One row of the table of the whole model."""
    own, dense = preset_config(preset, size), preset_config(dense_preset(preset), size)
    step, dense_step = training_step(own), training_step(dense)
    prefill, dense_prefill = (
        step_flops(config, prompt_load(config, TEXT_TOKENS, 1)).forward for config in (own, dense)
    )
    again, dense_again = (training_step(config, checkpointing=True).total for config in (own, dense))
    parts = (step.tower, step.projector, step.decoder, step.head, step.backward, step.model)
    cells = [*(f"{part / 1e12:.3g}" for part in parts), f"{step.model / dense_step.model:.1%}"]
    cells += [f"{prefill / 1e12:.3g}", f"{prefill / dense_prefill:.1%}", f"{again / dense_again:.1%}"]
    return "| " + " | ".join([f"`{preset}`", *cells]) + " |\n"


def line(preset: str, size: str) -> str:
    """One row of the table.

    Raises:
        RuntimeError: the formula and torch disagree.
    """
    config = preset_config(preset, size)
    dense = preset_config(dense_preset(preset), size)
    cost, skip = image_cost(config, TEXT_TOKENS), config.skip_config
    expected = cost.prefill_flops - 2 * config.text_config.hidden_size * config.text_config.vocab_size  # no head
    if (counted := counted_flops(config, TEXT_TOKENS)) != expected:
        raise RuntimeError(f"{preset} at {size}: torch counts {counted} FLOPs, the formula gives {expected}.")
    share = cost.prefill_flops / image_cost(dense, TEXT_TOKENS).prefill_flops
    sizes = (skip.retained, skip.skipped) if skip else (cost.tokens, "-")
    numbers = [*sizes, cost.tokens, round(cost.ffn_tokens), cost.cache_tokens]
    cells = [f"{cost.cache_bytes / 2**20:.2f}", f"{cost.prefill_flops / 1e12:.3g}", f"{share:.1%}"]
    return "| " + " | ".join([f"`{preset}`", *(str(number) for number in numbers), *cells]) + " |\n"


def run(
    output: Annotated[
        Path | None, typer.Option(help="The page to write; default: docs/costs.md.", show_default=False)
    ] = None,
) -> None:
    """Write the table of FLOPs and cache sizes of all presets."""
    output = output or home() / "docs" / "costs.md"
    page = HEADER
    for size in SIZES:
        page += COLUMNS.format(size=size) + "".join(line(preset, size) for preset in PRESETS)
        page += WHOLE_COLUMNS + "".join(whole_line(preset, size) for preset in PRESETS)
    write_text(output, page)
    print_text(f"Open {shown(output)}.")


def main() -> None:
    """Run the command line."""
    program(run)


if __name__ == "__main__":
    main()
