"""Writes docs/costs.md: what a picture costs under each preset at each size, from the configurations alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from llava_skip.configuration import LlavaSkipConfig
from llava_skip.decoder import build_language_model
from llava_skip.flops import decoder_flops, image_cost
from llava_skip.presets import PRESETS, SIZES, preset_config
from llava_skip.routing import Route

DENSE = {"llava": "llava", "hd": "llava-hd", "cos": "cos"}
"""Front end -> the dense preset that the others of its kind are compared with."""
TEXT_ROWS = 100

HEADER = f"""# What a picture costs

Made by `python eval/study/costs.py`, from the configurations alone. Rows are those of one picture in the language
model (of the most crops, for LLaVA-HD); the cache is that of all layers in bfloat16, after the prefill. FLOPs are those
of a prefill of the picture and {TEXT_ROWS} rows of text, head on the last row, relative to the dense model of the same
architecture ({", ".join(f"`{name}`" for name in DENSE.values())}); torch's FlopCounterMode counted the
same number on the meta device, at the true widths, for every line.
"""

COLUMNS = """
## {size}

| preset | retained | skipped | rows | rows with FFN | rows in the cache | cache (MiB) | prefill TFLOPs | of dense |
|---|---|---|---|---|---|---|---|---|
"""


def counted_flops(config: LlavaSkipConfig, text_rows: int) -> int:
    """What torch counts for a prefill of one picture and `text_rows` rows of text, without front end and head."""
    text, skip = config.text_config, config.skip_config
    rows = config.image_seq_length + text_rows
    with torch.device("meta"):
        model = build_language_model(text).eval()
        embeddings = torch.empty(1, rows, text.hidden_size)
        mask = torch.empty(1, 1, rows, rows)  # given, since making one looks at values
        ffn = torch.empty(rows - skip.num_skipping, dtype=torch.long) if skip else None
    route = Route(ffn_tokens=ffn, layers=skip.layers if skip else None)
    model.set_attn_implementation("eager")  # torch does not count its fused attention kernel for CPUs
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False, route=route)
    return counter.get_total_flops()


def line(preset: str, size: str) -> str:
    """One row of the table.

    Raises:
        RuntimeError: the formula and torch disagree.
    """
    config = preset_config(preset, size)
    dense = preset_config(DENSE[config.front_end], size)
    cost, skip = image_cost(config, TEXT_ROWS), config.skip_config
    rows, ffn_rows = cost.tokens + TEXT_ROWS, cost.ffn_tokens + TEXT_ROWS
    expected = decoder_flops(config.text_config, rows, ffn_rows, head_tokens=0).total
    if (counted := counted_flops(config, TEXT_ROWS)) != expected:
        raise RuntimeError(f"{preset} at {size}: torch counts {counted} FLOPs, the formula gives {expected}.")
    share = cost.prefill_flops / image_cost(dense, TEXT_ROWS).prefill_flops
    sizes = (skip.retained, skip.skipped) if skip else (cost.tokens, "-")
    numbers = [*sizes, cost.tokens, round(cost.ffn_tokens), cost.cache_tokens]
    cells = [f"{cost.cache_bytes / 2**20:.2f}", f"{cost.prefill_flops / 1e12:.3g}", f"{share:.1%}"]
    return "| " + " | ".join([f"`{preset}`", *(str(number) for number in numbers), *cells]) + " |\n"


def main(output: Annotated[Path, typer.Option(help="The page to write.")] = Path("docs/costs.md")) -> None:
    """Write the table."""
    page = HEADER
    for size in SIZES:
        page += COLUMNS.format(size=size) + "".join(line(preset, size) for preset in PRESETS)
    output.write_text(page, encoding="utf-8")
    typer.echo(f"{output}")


if __name__ == "__main__":
    typer.run(main)
