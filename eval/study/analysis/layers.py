"""Layer by layer: what it costs to leave a layer out for image tokens, and how simple they are there.

Shapes: B batch, T tokens of a sample, D width, H heads, R tokens whose output is read, M tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eval.study.analysis.batches import KINDS, VISUAL, Batch
from eval.study.analysis.linear import LinearFit
from eval.study.analysis.numbers import BANDS, as_text, column, draw_bands, summarise
from eval.study.analysis.walk import Walk, divergence, finish_changed, layer_by_layer
from llava_skip.decoder import SkippingLayer
from llava_skip.modeling import LlavaSkipForConditionalGeneration
from llava_skip_base.console import figure

TITLE = "Layer by layer"
CHANGES = {
    "ffn": "all image tokens skip the FFN of this one layer",
    "attention": "the attention of this one layer adds nothing to image tokens; other tokens still attend to them",
    "frozen": "both: image tokens pass the layer unchanged, and other tokens attend to them as they came in (ShortV)",
}
"""Name of a change -> what it is. Image tokens are all tokens of an image's block, its summaries too."""
MEASURES = {
    "kl": "KL(full || changed) of the next token's distribution after the prompt, in nats; one value for each sample "
    "with images",
    "kl_answers": "the same, as the mean over the tokens of the answer, each given the ones before (teacher forced): "
    "the data's answers of a training file, the model's own greedy answer to a benchmark's question",
    "shortv": "KL(changed || full) after the prompt: for frozen this is the layer contribution of ShortV's code",
    "flips": "share of the samples whose likeliest next token after the prompt changes",
    "linear": "R^2 of the best linear map instead of the FFN: least squares with bias from norm(x) to "
    "FFN(norm(x)) on the tokens of one half of the images, R^2 = 1 - (squared errors) / (squared distances "
    "from the mean) over all channels on the tokens of the other half; halves are of different images",
    "rank": "effective rank of one image's tokens (without summaries) as they enter the layer: exp of the entropy of "
    "their singular values, divided by the sum of these; not centred",
    "mass": "attention that the last token of the prompt pays to the tokens of a kind in this layer: softmax "
    "probabilities summed over these tokens, mean over the heads",
}
"""Name of a measure -> its definition."""
READING = {
    "in the charts": BANDS + ", over the samples (KL: the middle half alone; a straight axis below 1e-7)",
    "in the table": "means over the samples, which a few samples can lead; of the rank, over the images",
}
DEFINITIONS = CHANGES | MEASURES | READING


@torch.no_grad()
def measure(model: LlavaSkipForConditionalGeneration, batches: Sequence[Batch]) -> dict[str, Any]:
    """All measures in every layer; see `CHANGES` and `MEASURES`.

    Returns:
        `kl`, `kl_answers`, `shortv` and `flips` are change -> for each layer `summarise` over the samples (`flips`: a
        share); `linear` is kind -> for each layer R^2 and the tokens of both halves; `rank` and `mass` are
        `summarise` for each layer, the latter by kind. `order` are the layers by ShortV's contribution, the lowest
        first.
    """
    result: dict[str, Any] = {"definitions": MEASURES, "changes": CHANGES, "rank": [], "linear": {}, "mass": {}}
    result |= {name: {change: [] for change in CHANGES} for name in ("kl", "kl_answers", "shortv", "flips")}
    halves = image_halves(batches)
    for index, layer, walks in layer_by_layer(model, batches, "layers"):
        for change in CHANGES:
            _add_change(result, change, [_change(model, walk, index, change) for walk in walks])
        _add_linear(result["linear"], layer, index, walks, halves)
        result["rank"].append(summarise([rank for walk in walks for rank in _ranks(walk)]))
        masses = [attention_masses(layer, walk, index) for walk in walks]
        for kind in masses[0]:
            values = torch.cat([own[kind] for own in masses])
            if values.isfinite().any():
                result["mass"].setdefault(kind, []).append(summarise(values.cpu().numpy()))
    means = column(result["shortv"]["frozen"], "mean")
    result["order"] = sorted(range(len(means)), key=means.__getitem__)
    return result


# ------------------------------------------------------------------------------------------------ what a layer is for


def _change(model: LlavaSkipForConditionalGeneration, walk: Walk, index: int, change: str) -> dict[str, Tensor]:
    """Values of the samples with images: `kl`, `shortv`, `flips`, and `kl_answers`, NaN without an answer."""
    batch = walk.batch
    image = batch.images >= 0
    ffn, attention = change in ("ffn", "frozen"), change in ("attention", "frozen")
    changed = finish_changed(model, walk, index, image, ffn=ffn, attention=attention)
    forward, backward, flipped = divergence(model, walk.final, changed)
    rows, columns = walk.read // image.shape[1], walk.read % image.shape[1]
    at_last = columns == batch.last[rows]
    answers = batch.answers[rows, columns]
    count = torch.zeros(len(image), device=forward.device).index_add(0, rows[answers], answers[answers].float())
    total = torch.zeros(len(image), device=forward.device).index_add(0, rows[answers], forward[answers])
    shown = image.any(dim=1)
    values = {"kl": forward[at_last], "shortv": backward[at_last], "flips": flipped[at_last].float()}
    return {name: value[shown].cpu() for name, value in (values | {"kl_answers": total / count}).items()}


def _add_change(result: dict[str, Any], change: str, parts: Sequence[dict[str, Tensor]]) -> None:
    for name in ("kl", "kl_answers", "shortv", "flips"):
        values = torch.cat([part[name] for part in parts])
        if name == "kl_answers":
            values = values[values.isfinite()]
        mean = float(values.mean()) if len(values) else None
        result[name][change].append(mean if name == "flips" else summarise(values.numpy()))


# ------------------------------------------------------------------------------------------ how simple image tokens are


def image_halves(batches: Sequence[Batch]) -> list[Tensor]:
    """For each batch [B, T] bool, the tokens of images of the first half; equal images are in one half.

    Benchmarks ask several questions about an image, and its tokens are then the same: they must not be in both halves.
    """
    numbers: dict[bytes, int] = {}
    halves = []
    for batch in batches:
        if "pixel_values" not in batch.inputs:
            halves.append(torch.zeros_like(batch.images, dtype=torch.bool))
            continue
        pixels = batch.inputs["pixel_values"]
        counts = batch.inputs["crop_counts"].tolist() if "crop_counts" in batch.inputs else [1] * len(pixels)
        keys = [crops.float().numpy().tobytes() for crops in pixels.split(counts)]
        first = torch.tensor([numbers.setdefault(key, len(numbers)) % 2 == 0 for key in keys])
        halves.append(first[batch.images.clamp(min=0)] & (batch.images >= 0))
    return halves


def _add_linear(
    found: dict[str, Any], layer: SkippingLayer, index: int, walks: Sequence[Walk], halves: Sequence[Tensor]
) -> None:
    """Add the fit of each kind of image tokens in one layer."""
    fits: dict[str, LinearFit] = {}
    for walk, half in zip(walks, halves, strict=True):
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(walk.state), **walk.attention_call(index))
        for kind in VISUAL:
            chosen = walk.batch.of_kinds(kind)
            if not chosen.any():
                continue
            normed = layer.post_attention_layernorm((walk.state + attended)[chosen])
            fits.setdefault(kind, LinearFit()).add(normed, layer.mlp(normed), half.to(chosen.device)[chosen])
    for kind, fit in fits.items():
        found.setdefault(kind, []).append(fit.result())


def _ranks(walk: Walk) -> list[float]:
    """The effective rank of each image's tokens."""
    visual = walk.batch.of_kinds(*VISUAL)
    return [
        effective_rank(walk.state[(walk.batch.images == number) & visual])
        for number in range(int(walk.batch.images.max()) + 1)
    ]


def effective_rank(tokens: Tensor) -> float:
    """The exp of the entropy of the singular values of [M, D], over their sum; not centred (Roy and Vetterli, 2007).

    Between 1 and min(M, D); NaN for tokens that are all zero.
    """
    rows = tokens.double()
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def attention_masses(layer: SkippingLayer, walk: Walk, index: int) -> dict[str, Tensor]:
    """Kind -> [B] attention of each prompt's last token to the tokens of the kind; NaN for samples without the kind."""
    batch = walk.batch
    call = walk.attention_call(index)
    weights = attention_of(layer, walk.state, batch.last, call["position_embeddings"], call.get("attention_mask"))
    mean = weights.mean(dim=1)
    found = {}
    for kind in KINDS:
        chosen = batch.of_kinds(kind)
        found[kind] = (mean * chosen).sum(dim=1).masked_fill(~chosen.any(dim=1), torch.nan)
    return found


def attention_of(
    layer: SkippingLayer, state: Tensor, tokens: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """Attention of one token a sample in a layer; no attention map is formed.

    Args:
        layer: the layer.
        state: [B, T, D] as it enters the layer.
        tokens: [B] the token of each sample.
        positions: cosines and sines of the rotary embedding, [1 or B, T, E] each.
        mask: 4-D as transformers makes it, bool (True: seen) or to be added; None or another: causal.

    Returns:
        [B, H, T] softmax probabilities, in float32.
    """
    attention, normed = layer.self_attn, layer.input_layernorm(state)
    rows = torch.arange(len(tokens), device=state.device)
    cosine, sine = (table.expand(len(tokens), -1, -1) for table in positions)
    heads = (-1, attention.head_dim)
    query = attention.q_proj(normed[rows, tokens]).unflatten(-1, heads)
    key = attention.k_proj(normed).unflatten(-1, heads)
    query, key = (getattr(attention, name, nn.Identity())(part) for name, part in (("q_norm", query), ("k_norm", key)))
    query = _rotated(query, cosine[rows, tokens, None], sine[rows, tokens, None])
    key = _rotated(key, cosine[:, :, None], sine[:, :, None])
    key = key.repeat_interleave(query.shape[1] // key.shape[2], dim=2)
    scores = torch.einsum("bhe,bthe->bht", query, key).float() * attention.scaling
    seen = torch.arange(state.shape[1], device=state.device) <= tokens[:, None]
    if mask is not None and mask.ndim == 4:
        row = mask.expand(len(tokens), -1, -1, -1)[rows, 0, tokens, : state.shape[1]]
        seen = seen & (row if row.dtype == torch.bool else row >= 0)
    return scores.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)


def _rotated(vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The rotary embedding in transformers' form: the halves of a head are the pairs."""
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cosine + torch.cat([-second, first], dim=-1) * sine


# ------------------------------------------------------------------------------------------------------------- figures


def draw(result: dict[str, Any], folder: Path) -> list[str]:
    """A chart of the changes, and one of the states; the names of the files."""
    with figure(folder / "layers-kl.png", (11, 4), ncols=2) as (left, right):
        answered = any(numbers["n"] for numbers in result["kl_answers"]["ffn"])
        for number, change in enumerate(CHANGES):
            draw_bands(left, result["kl"][change], change, f"C{number}", outer=False)
            if answered:
                draw_bands(right, result["kl_answers"][change], change, f"C{number}", outer=False)
            else:
                right.plot(result["flips"][change], ".-", color=f"C{number}", label=change)
        left.set(xlabel="layer", ylabel="KL(full || changed), nats", title="first token of the answer")
        _small_values(left)
        if answered:
            right.set(xlabel="layer", title="mean over the tokens of the answer")
            _small_values(right)
        else:
            right.set(xlabel="layer", ylabel="share", title="samples whose likeliest first token changes")
        for axes in (left, right):
            axes.grid(alpha=0.3)
        left.legend(loc="upper right", title="image tokens leave out")
    with figure(folder / "layers-states.png", (13, 4), ncols=3) as (fit, rank, mass):
        for kind, by_layer in result["linear"].items():
            values = [float("nan") if own["r2"] is None else own["r2"] for own in by_layer]
            fit.plot(values, ".-", color=f"C{KINDS.index(kind)}", label=kind)
        fit.set(xlabel="layer", ylabel="R^2 on the other half of the images", title="a linear map in the FFN's place")
        fit.xaxis.get_major_locator().set_params(integer=True)
        if all(own["r2"] is None for by_layer in result["linear"].values() for own in by_layer):
            fit.text(0.5, 0.5, "too few tokens: take more samples", ha="center", transform=fit.transAxes)
            fit.set(xlim=(-0.5, len(result["rank"]) - 0.5), ylim=(0, 1))
        draw_bands(rank, result["rank"], "an image", "C1")
        rank.set(xlabel="layer", title="effective rank of an image's tokens", ylim=(0, None))
        for kind, by_layer in result["mass"].items():
            draw_bands(mass, by_layer, kind, f"C{KINDS.index(kind)}")
        mass.set(xlabel="layer", ylabel="share", title="attention of the last prompt token to", ylim=(0, 1))
        for axes in (fit, rank, mass):
            axes.grid(alpha=0.3)
        for axes in (fit, mass):
            axes.legend(fontsize=8, loc="best")
    return ["layers-kl.png", "layers-states.png"]


def _small_values(axes: Any) -> None:
    """Powers of ten down to what float32 resolves, and 0: a change in the last layer gives exactly 0."""
    axes.set_yscale("symlog", linthresh=1e-7)
    axes.set_ylim(bottom=0)


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a row for each layer, means over the samples."""
    linear, masses = result["linear"], {k: v for k, v in result["mass"].items() if k != "text"}
    headings = [
        "layer",
        *(f"KL, {change}" for change in CHANGES),
        *(f"KL of answers, {change}" for change in CHANGES),
        "ShortV's contribution",
        "answers that change, frozen",
    ]
    headings += [f"R^2 linear, {kind}" for kind in linear] + ["effective rank"]
    headings += [f"attention to {kind}" for kind in masses]
    rows = []
    for n in range(len(result["rank"])):
        cells = [as_text(result["kl"][change][n]["mean"]) for change in CHANGES]
        cells += [as_text(result["kl_answers"][change][n]["mean"]) for change in CHANGES]
        flips = result["flips"]["frozen"][n]
        cells += [as_text(result["shortv"]["frozen"][n]["mean"]), "-" if flips is None else f"{flips:.0%}"]
        cells += [as_text(own[n]["r2"]) for own in linear.values()] + [as_text(result["rank"][n]["mean"])]
        rows.append([str(n), *cells, *(as_text(own[n]["mean"]) for own in masses.values())])
    return headings, rows


def notes(result: dict[str, Any]) -> list[str]:
    """ShortV's order of the layers, and on how many tokens the linear maps were fitted."""
    order = "+".join(map(str, result["order"]))
    found = [f"Layers by ShortV's contribution, the lowest first: {order}."]
    for kind, by_layer in result["linear"].items():
        own = by_layer[0]
        found.append(f"Linear map, {kind}: fitted on {own['fitted']:,} tokens, judged on {own['held_out']:,}.")
    return found
