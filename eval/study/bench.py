"""Dense against skipping on random weights, in one run: `python -m eval.study.bench`.

It times everything after the projector: merging, summaries, routing, decoder, head. The ideal is the same ratio
counted in FLOPs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from eval.answering.clock import device_name
from llava_skip.configuration import IGNORE_INDEX, LlavaSkipConfig
from llava_skip.flops import decoder_flops
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip.presets import PRESETS, front_end_of, preset_config, preset_skip
from llava_skip_base.console import chart_label, figure, make_table, output_console, print_next, program
from llava_skip_base.errors import UserError
from llava_skip_base.files import write_json
from llava_skip_base.paths import results, shown

SMALL = "width-1024"
"""A decoder of LLaMA3's proportions that a CPU can run: 6 layers, 4 of 16 key-value heads, FFN 3.5 times as wide."""


def bench_config(preset: str, size: str) -> LlavaSkipConfig:
    """A preset's model with 576 tokens an image; its vision tower is not timed and as small as possible."""
    if size == SMALL:
        widths = {"vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 3584, "max_position_embeddings": 8192}
        text = LlamaConfig(num_hidden_layers=6, num_attention_heads=16, num_key_value_heads=4, **widths)
        image_token = 2047
    else:
        whole = preset_config("llava", size)
        text, image_token = whole.text_config, whole.image_token_id
    tower = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=24, patch_size=1
    )
    skip = preset_skip(preset)
    fields = {"image_token_index": image_token, "skip": skip and skip.to_dict()}
    return LlavaSkipConfig(vision_config=tower, text_config=text, **fields)


class Candidate:
    """One preset's model with inputs for both measurements."""

    def __init__(self, preset: str, size: str, batch: int, text_tokens: int, device: str, dtype: torch.dtype) -> None:
        self.config = bench_config(preset, size)
        torch.manual_seed(0)
        with torch.device(device):
            default = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            self.model = LlavaSkipForConditionalGeneration(self.config)
            torch.set_default_dtype(default)
        self.model.model.vision_tower.requires_grad_(False)
        length, width = self.config.image_seq_length, self.config.text_config.hidden_size
        tokens = torch.randn(batch, self.config.patches, width, device=device, dtype=dtype)
        self.tokens = tokens.requires_grad_()
        text = torch.randint(0, 1000, (batch, text_tokens), device=device)
        image = torch.full((batch, length), self.config.image_token_id, device=device)
        self.input_ids = torch.cat([text[:, :1], image, text[:, 1:]], dim=1)
        unsupervised = torch.full_like(self.input_ids[:, : length + 1], IGNORE_INDEX)
        self.labels = torch.cat([unsupervised, text[:, 1:]], dim=1)

    def _features(self) -> dict[str, Any]:
        return {"image": BaseModelOutputWithPooling(pooler_output=self.model.model.block(self.tokens))}

    def train_step(self) -> None:
        """Forward and backward of one batch, without an optimizer."""
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        self.model(self.input_ids, mm_encoder_outputs=self._features(), labels=self.labels).loss.backward()

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """A prompt into the cache and the logits of the first new token."""
        self.model.eval()
        outputs = self.model(self.input_ids, mm_encoder_outputs=self._features(), use_cache=True, logits_to_keep=1)
        return outputs.logits

    def flops(self, head_tokens: int, asking: int | None = None) -> int:
        """FLOPs of a forward of the language model; `asking` as in `decoder_flops`."""
        samples, tokens = self.input_ids.shape
        skip, text = self.config.skip_config, self.config.text_config
        ffn_tokens = samples * (tokens - (skip.mean_num_skipping(text.num_hidden_layers) if skip else 0))
        last = {"asking": asking, "last_ffn_tokens": head_tokens}
        return decoder_flops(text, tokens, ffn_tokens, head_tokens, samples, **last).total

    @property
    def cache_tokens(self) -> int:
        """Tokens of one image that a layer's cache keeps."""
        skip = self.config.skip_config
        return self.config.image_seq_length if skip is None else skip.num_kept


def seconds(step: Callable[[], Any], device: str) -> float:
    """Time of one call; a GPU is synchronised before each reading of the clock."""
    synchronize = torch.cpu.synchronize if device == "cpu" else torch.cuda.synchronize
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def measure(candidates: dict[str, Candidate], kind: str, repeats: int, device: str) -> dict[str, float]:
    """Fastest time of each candidate; they take turns, so that other load on the machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in tqdm(range(-2, repeats), desc=kind, disable=None):
        for name, candidate in candidates.items():
            elapsed = seconds(getattr(candidate, kind), device)
            if repeat >= 0:  # the first two calls warm up
                times[name].append(elapsed)
    return {name: min(values) for name, values in times.items()}


def compare(candidates: dict[str, Candidate], repeats: int, device: str) -> list[dict[str, Any]]:
    """A row for each measurement and preset: milliseconds, ratio to the dense model, ideal, and how far from it."""
    rows = []
    for kind in ("train_step", "prefill"):
        times = measure(candidates, kind, repeats, device)
        flops = {
            name: c.flops(int((c.labels[:, 1:] != IGNORE_INDEX).sum()))
            if kind == "train_step"
            else c.flops(len(c.input_ids), asking=1)
            for name, c in candidates.items()
        }
        for name, candidate in candidates.items():
            ratio, ideal = times[name] / times["llava"], flops[name] / flops["llava"]
            rows.append(
                {
                    "measurement": kind,
                    "preset": name,
                    "milliseconds": 1000 * times[name],
                    "ratio": ratio,
                    "flop_ratio": ideal,
                    "over_ideal": ratio / ideal,
                    "cache_rows_a_picture": candidate.cache_tokens,
                }
            )
    return rows


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of the measured ratios next to the ideal ones."""
    rows = [row for row in rows if row["preset"] != "llava"]
    centres = range(len(rows))
    with figure(path, (8, 4)) as axes:
        axes.bar([c - 0.2 for c in centres], [row["ratio"] for row in rows], 0.4, label="measured")
        ideal = [row["flop_ratio"] for row in rows]
        axes.bar([c + 0.2 for c in centres], ideal, 0.4, label="FLOP ideal", color="lightgray")
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks(list(centres), [f"{row['preset']}\n{row['measurement'].replace('_', ' ')}" for row in rows])
        axes.set(ylabel="time, dense = 1", title=chart_label(title))
        axes.legend()


def run(
    size: Annotated[str, typer.Option(help=f"{SMALL}, vicuna-7b or llama3-8b.")] = SMALL,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    presets: Annotated[str, typer.Option(help="Skipping presets, separated by commas.")] = "sv-llava-100,sv-llava-256",
    batch: Annotated[int, typer.Option(min=1, help="Samples at once.")] = 2,
    text_rows: Annotated[int, typer.Option(min=2, help="Text tokens of a sample.")] = 100,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each kind.")] = 8,
    output: Annotated[Path | None, typer.Option(help="Folder of the JSON and the chart.")] = None,
) -> None:
    """Time a training step and a prefill of the dense and the skipping decoder, as ratios next to the FLOP ideal."""
    output = output or Path(shown(results() / "bench"))
    names = ["llava", *presets.split(",")]
    # Front ends are not timed; presets with another one have another dense model.
    known = [name for name in PRESETS if front_end_of(name) is front_end_of("llava")]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"unknown presets {unknown}; known: {', '.join(known)}")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    candidates = {name: Candidate(name, size, batch, text_rows, device, dtype) for name in names}
    rows = compare(candidates, repeats, device)
    headings = ("measurement", "preset", "ms", "ratio", "FLOP ideal", "over ideal", "cached tokens of an image")
    cells = [
        (
            row["measurement"].replace("_", " "),
            row["preset"],
            f"{row['milliseconds']:.1f}",
            *(f"{row[name]:.3f}" for name in ("ratio", "flop_ratio", "over_ideal")),
            row["cache_rows_a_picture"],
        )
        for row in rows
    ]
    title = f"{size} on {device_name(device)}, batch {batch}, {text_rows} text tokens"
    output_console().print(make_table(title, headings, cells, right=5))
    result = {"size": size, "device": device_name(device), "dtype": str(dtype), "batch": batch, "text_rows": text_rows}
    result |= {"torch": torch.__version__, "repeats": repeats, "rows": rows}
    write_json(output / f"{size}.json", result)
    draw(rows, output / f"{size}.png", f"{size}, {device_name(device)}")
    print_next(f"open {output / size}.png; the figures are in {output / size}.json")


def main() -> None:
    """Run the command line."""
    program(run)


if __name__ == "__main__":
    main()
