"""Figure 1: by how much FFN and attention change a token, by layer and kind of token.

Shapes: B batch, T tokens of a sample, D width, M tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from eval.study.analysis.batches import KINDS, Batch
from eval.study.analysis.numbers import BANDS, Numbers, as_text, column, draw_bands, middle, powers_of_ten, summarise
from eval.study.analysis.walk import Walk, layer_by_layer
from llava_skip.decoder import SkippingLayer
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip_base.console import figure

TITLE = "What FFN and attention change (figure 1)"
FORMULAS = {
    "update": "||u|| / ||x||",
    "norm": "||x + u|| / ||x||",
    "channels": "mean over the channels c of |u_c| / (|x_c| + 1e-6)",
    "turn": "1 - cos(x, x + u)",
}
"""Name of a definition -> the formula, for one token with state x and update u."""
UPDATES = {
    "ffn": "u = FFN(norm(x)), x the state after the layer's attention",
    "attention": "u = what the layer's attention adds, x the state that enters the layer",
}
"""Name of an update -> what x and u are."""
TOKENS = (
    "text: all that is no image token; image: those of a model that skips nothing; of one that skips: retained (take "
    "every FFN), skipped (dashed for the FFN, which is not run: what it would add), exempt (skipped, but keep the "
    "FFN), summary"
)
"""The kinds, for a reader."""
READING = {
    "tokens": TOKENS,
    "in the charts": BANDS + ", over all tokens of a kind",
    "in the table": "the median of a kind's tokens, averaged over the layers, which one layer can lead; all are ratios",
}
DEFINITIONS = UPDATES | FORMULAS | READING
NOT_RUN = "FFN not run: what it would add"


@torch.no_grad()
def measure(
    model: LlavaSkipForConditionalGeneration, batches: Sequence[Batch], would_be: bool = True
) -> dict[str, Any]:
    """All definitions of both updates, by layer and kind, with quantiles over all tokens.

    Args:
        model: the model.
        batches: the samples.
        would_be: for tokens that skip the FFN of a layer, measure what it would have added to the states that they
            have there; without it they have no numbers for the FFN.

    Returns:
        `values` is update -> definition -> kind -> `summarise` of each layer; `ffn_run` is kind -> for each layer the
        share of the tokens that took its FFN. Kinds without tokens are left out.
    """
    values: dict[str, Any] = {update: {name: defaultdict(list) for name in FORMULAS} for update in UPDATES}
    run: dict[str, list[float]] = defaultdict(list)
    for index, layer, walks in layer_by_layer(model, batches, "updates"):
        parts = [_of_batch(walk, index, layer, would_be) for walk in walks]
        kinds = torch.cat([kind for kind, _, _ in parts])
        taken = torch.cat([own for _, own, _ in parts])
        for number, kind in enumerate(KINDS):
            chosen = kinds == number
            if not chosen.any():
                continue
            run[kind].append(float(taken[chosen].float().mean()))
            for update in UPDATES:
                for place, name in enumerate(FORMULAS):
                    own_values = torch.cat([own[update][place] for _, _, own in parts])[chosen]
                    if update == "ffn" and not would_be:
                        own_values = own_values[taken[chosen]]
                    values[update][name][kind].append(summarise(own_values.numpy()))
    return {
        "definitions": DEFINITIONS,
        "would_be": would_be,
        "ffn_run": dict(run),
        "values": {update: {name: dict(own) for name, own in by.items()} for update, by in values.items()},
    }


def _of_batch(walk: Walk, index: int, layer: SkippingLayer, would_be: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Of a batch's real tokens: kinds [M], whether the FFN was taken [M], and each update's definitions [4, M]."""
    real = walk.batch.kinds >= 0
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(walk.state), **walk.attention_call(index))
    before, added = walk.state[real], attended[real]
    after = before + added
    taken = walk.takes_ffn(index)[real]
    ffn = torch.full_like(after, torch.nan)
    runs = torch.ones_like(taken) if would_be else taken
    ffn[runs] = layer.mlp(layer.post_attention_layernorm(after[runs]))
    measured = {"attention": sizes(before, added).cpu(), "ffn": sizes(after, ffn).cpu()}
    return walk.batch.kinds[real].cpu(), taken.cpu(), measured


def sizes(x: Tensor, update: Tensor) -> Tensor:
    """The definitions, in their order: states and updates [M, D] -> [4, M] float32."""
    x, update = x.float(), update.float()
    norm, changed = x.norm(dim=-1), x + update
    # 1 - cos of unit vectors a and b is ||a - b||^2 / 2, which keeps its digits where the angle is small.
    turn = (x / norm[:, None] - changed / changed.norm(dim=-1, keepdim=True)).square().sum(dim=-1) / 2
    channels = (update.abs() / (x.abs() + 1e-6)).mean(dim=-1)
    return torch.stack([update.norm(dim=-1) / norm, changed.norm(dim=-1) / norm, channels, turn])


def label_of(result: dict[str, Any], update: str, kind: str) -> str:
    """A kind as a chart and a table name it; says where the FFN was not run."""
    return f"{kind} ({NOT_RUN})" if update == "ffn" and result["would_be"] and not _is_run(result, kind) else kind


def _is_run(result: dict[str, Any], kind: str) -> bool:
    return all(share == 1.0 for share in result["ffn_run"][kind])


def draw(result: dict[str, Any], folder: Path) -> list[str]:
    """Both updates side by side, and a chart for each with a panel for each definition; the names of the files."""
    names = ["figure-1.png"]
    with figure(folder / names[0], (11, 4), ncols=2, sharey=True) as both:
        for axes, update in zip(both, UPDATES, strict=True):
            _draw_update(axes, result, update, "update")
            axes.set_title(f"{update}: length of the update, {FORMULAS['update']}", fontsize=10)
            powers_of_ten(axes)
            axes.legend(fontsize=8, loc="upper right")
    for update, about in UPDATES.items():
        names.append(f"update-{update}.png")
        with figure(folder / names[-1], (11, 7.5), nrows=2, ncols=2) as grid:
            for axes, (name, formula) in zip(grid.flat, FORMULAS.items(), strict=True):
                _draw_update(axes, result, update, name)
                axes.set_title(f"{name}: {formula}", fontsize=10)
                if name != "norm":
                    powers_of_ten(axes)
            grid.flat[0].legend(fontsize=8, loc="upper right")
            grid.flat[0].figure.suptitle(f"{update}: {about}", fontsize=10)
    return names


def _draw_update(axes: Any, result: dict[str, Any], update: str, name: str) -> None:
    """All kinds of tokens in one panel."""
    for kind, by_layer in result["values"][update][name].items():
        dashed = update == "ffn" and not _is_run(result, kind)
        draw_bands(axes, by_layer, label_of(result, update, kind), f"C{KINDS.index(kind)}", dashed)
    axes.set_xlabel("layer")
    axes.grid(alpha=0.3)


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: the median token of each kind, averaged over the layers."""
    rows = []
    for update in UPDATES:
        for kind in result["ffn_run"]:
            cells = [as_text(middle(result["values"][update][name][kind])) for name in FORMULAS]
            count = result["values"]["attention"]["update"][kind][0]["n"]
            rows.append([update, label_of(result, update, kind), f"{count:,}", *cells])
    return ["part", "tokens", "how many", *FORMULAS.values()], rows


def layer_table(result: dict[str, Any], update: str, name: str) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: the median of one definition in each layer, a column for each kind."""
    by_kind: dict[str, list[Numbers]] = result["values"][update][name]
    headings = ["layer", *(label_of(result, update, kind) for kind in by_kind)]
    layers = len(next(iter(by_kind.values())))
    return headings, [[str(n), *(as_text(own[n]["q50"]) for own in by_kind.values())] for n in range(layers)]


def notes(result: dict[str, Any]) -> list[str]:
    """By how much FFN and attention change text more than image tokens, and how many values were left out."""
    found = []
    for update in UPDATES:
        values = result["values"][update]["update"]
        for kind in (kind for kind in ("image", "retained", "skipped") if kind in values and "text" in values):
            pairs = zip(column(values["text"], "q50"), column(values[kind], "q50"), strict=True)
            ratios = {layer: text / own for layer, (text, own) in enumerate(pairs) if own > 0 and text == text}
            if ratios:
                order = sorted(ratios, key=ratios.__getitem__)
                least, most = (f"{ratios[layer]:.2f} in layer {layer}" for layer in (order[0], order[-1]))
                found.append(
                    f"{update}: the median update of text, ||u|| / ||x||, is longer than that of "
                    f"{label_of(result, update, kind)} tokens in {sum(ratio > 1 for ratio in ratios.values())} of "
                    f"{len(ratios)} layers. Text over {kind}: {median(ratios.values()):.2f} in the median layer, "
                    f"{least} to {most}."
                )
    lost = sum(n["not_finite"] for by in result["values"].values() for o in by.values() for k in o.values() for n in k)
    return found + ([f"{lost:,} values were not finite and are left out."] if lost else [])
