"""The error of skipping the FFN, by layer: bounded from the weights, bounded at the actual states, and measured.

docs/theory.md has the definitions, the theorems and what is an estimate. x are the states with skipping, y those
without, on the same weights and tokens.

Shapes: B samples, T tokens, D width, M tokens of one kind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval.study.analysis.layer_bounds import FfnBound, attention_bound, hidden_product, why_unbounded
from eval.study.analysis.spectral import largest_gain
from eval.study.analysis.streams import Kinds, divergence, plain_attention, run_both
from llava_skip_base.console import figure
from llava_skip_base.errors import UserError

STEPS = 12
"""Steps of power iteration for the norm of a Jacobian."""
POINTS = ((0.0, 1.0), (1 / 3, 2 / 3))
"""Where between x (0) and y (1) a Jacobian is taken: pairs, since two points go through a layer at once."""
GROUPS = ("skipped", "behind")
SHOWN = ("skipped", "text")
ONE_LAYER = ("global", "norm", "product", "actual")
CURVES = {"global": "global: a bound", "local": "local: estimate of a bound", "measured": "measured"}
ROUNDING = 1e-5
"""Relative excess over a bound that counts as a violation only above it: states are rounded."""

DEFINITIONS = {
    "x, y": "states after a layer with skipping, and without, on the same weights and tokens",
    "in the charts": "layers are counted from 0; medians and the middle half, of errors over the samples, of one FFN "
    "over the skipped tokens; an error of exactly 0 is not on an axis of powers of ten",
    "error": "Frobenius norm of y - x over that of x, of the skipped tokens of a sample, or of its text behind them",
    "measured": "the error itself",
    "local": "propagated from layer to layer with the largest gains of the Jacobians of attention and FFN that power "
    "iteration found at points between x and y: an estimate of a bound",
    "global": "from the weights and the norms' gains alone: a theorem, whatever the states",
    "one_layer": "what one FFN adds to a skipped token of y, over the norm of its state y after attention: actual "
    "|FFN(n)|; product s(down) |silu(gate n) * up n|; norm s(down) s(gate) s(up) |n|^2; global, with max|g| sqrt(D) in "
    "the place of |n|",
    "kl": "nats, KL(without skipping || with skipping) of the token after the prompt; kl_answers: of the tokens of the "
    "answers that follow prompts",
}

Values = dict[str, list[float]]


def measure(
    model: Any, batches: Iterable[Mapping[str, Tensor]], steps: int = STEPS, progress: bool = True
) -> dict[str, Any]:
    """The error of skipping on batches of prompts, with its bounds.

    Args:
        model: `LlavaSkipForConditionalGeneration`, best in float32. If it skips, its skipped tokens are compared with
            not skipping them; if it is dense, all image tokens skip the FFN of every layer.
        batches: what the processor gives for prompts, padded on either side, on the model's device. Where answers
            follow, also `last` [B], the index of each prompt's last token, and `answers` [B, T] bool, the tokens whose
            next one belongs to an answer. Samples without an image are left out.
        steps: of power iteration for each Jacobian.
        progress: whether to show a bar.

    Returns:
        `definitions`, `samples`, `skipping` ("of the checkpoint" or "all image tokens"), `steps`, `kl`, `kl_answers`,
        `left_out` (why there are no bounds, or None), `violations` (how often a bound is below what was measured) and
        `layers`. Of each layer: `layer`, `skips`, for "skipped" and "text" the errors `measured`, `local` and `global`
        and `per_token` (|y - x| / |x| of single tokens), `one_layer` and the `constants`. A quantity is what `spread`
        gives, over samples (`one_layer` and `per_token`: over tokens).

    Raises:
        UserError: no batch has an image, flash attention is used, or a reduction acts between the decoder's layers.
    """
    reduction = model.config.reduction_config
    if reduction is not None and reduction.rule.in_decoder:
        raise UserError(
            f"The model has the reduction {reduction}, which drops or freezes tokens between the layers, so states "
            "with and without skipping are not those of the same tokens: measure the dense model, without a reduction."
        )
    language_model = model.model.language_model
    reason = why_unbounded(language_model.config, language_model.layers)
    bounds = None if reason else [(attention_bound(layer), FfnBound.of(layer)) for layer in language_model.layers]
    was_training = model.training
    model.eval()
    found = _Found(len(language_model.layers))
    with plain_attention(model):
        for inputs in tqdm(batches, desc="error of skipping", disable=None if progress else True):
            kinds = Kinds.of(model, inputs)
            if kinds.skipped.any():
                errors = _Batch(model, kinds, bounds, steps, found)
                states = run_both(model, inputs, kinds, errors.after_layer)
                has_image = kinds.skipped.any(dim=1, keepdim=True)
                found.kl += divergence(model, states, kinds.last & has_image).tolist()
                found.kl_answers += divergence(model, states, kinds.answers & has_image).tolist()
    model.train(was_training)
    if not found.kl:
        raise UserError("No prompt has an image, so nothing is skipped: give data with images.")
    dense = model.config.skip_config is None
    result = {"definitions": DEFINITIONS, "samples": len(found.kl), "left_out": reason, "kl": spread(found.kl)}
    result["kl_answers"] = spread(found.kl_answers)
    result |= {"skipping": "all image tokens" if dense else "of the checkpoint", "steps": steps}
    return result | {"layers": found.rows(), "violations": dict(found.violations) if bounds else None}


def spread(values: list[float]) -> dict[str, float | None]:
    """Count, mean, quantiles and the largest of some values; None without any."""
    names = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95, "most": 1.0}
    if not values:
        return {"n": 0} | dict.fromkeys(("mean", *names))
    tensor = np.asarray(values, dtype=np.float64)
    found = np.quantile(tensor, list(names.values()))
    return {"n": len(values), "mean": float(tensor.mean())} | dict(zip(names, found.tolist(), strict=True))


class _Found:
    """What all batches gave: values of each layer by name, and how often a bound was too low."""

    def __init__(self, layers: int) -> None:
        self.values: list[Values] = [defaultdict(list) for _ in range(layers)]
        self.skips = [False] * layers
        self.kl: list[float] = []
        self.kl_answers: list[float] = []
        self.violations = dict.fromkeys(("one_layer", "local", "global"), 0)

    def add(self, layer: int, name: str, values: Tensor) -> None:
        """Keep values of a layer."""
        self.values[layer][name] += values.flatten().tolist()

    def check(self, bound: str, upper: Tensor, actual: Tensor) -> None:
        """Count where `upper` is below what it bounds."""
        self.violations[bound] += int((actual > upper * (1 + ROUNDING)).sum())

    def rows(self) -> list[dict[str, Any]]:
        """Of each layer: the names, split at dots, with the spread of their values."""
        rows = []
        for layer, values in enumerate(self.values):
            row: dict[str, Any] = {"layer": layer, "skips": self.skips[layer]}
            for name, own in values.items():
                *path, last = name.split(".")
                place = row
                for part in path:
                    place = place.setdefault(part, {})
                place[last] = spread(own)
            rows.append(row)
        return rows


class _Batch:
    """The errors of one batch, carried from layer to layer.

    Attributes:
        samples: indices of the samples that have an image.
        local: by group, [samples] float64, the propagated bound of the Frobenius norm of y - x.
        anywhere: the bound of theorem 3, of a single token, by group.
    """

    def __init__(
        self, model: Any, kinds: Kinds, bounds: list[tuple[float, FfnBound]] | None, steps: int, found: _Found
    ) -> None:
        self.kinds, self.bounds, self.steps, self.found = kinds, bounds, steps, found
        skip = model.config.skip_config
        self.layers = None if skip is None else skip.layers
        self.samples = kinds.skipped.any(dim=1).nonzero().squeeze(1)
        self.local = {group: torch.zeros(len(self.samples), dtype=torch.float64) for group in GROUPS}
        self.anywhere = dict.fromkeys(GROUPS, 0.0)

    def after_layer(self, number: int, layer: Any, before: Tensor, arguments: dict[str, Any], after: Tensor) -> None:
        """Take the errors of a layer from its input and output, [2B, T, D] each."""
        skips = self.layers is None or number in self.layers
        self.found.skips[number] = skips
        if self.bounds is not None:
            attention, ffn = self.bounds[number]
            self._anywhere(skips, attention, ffn.anywhere)
            self._local(number, skips, layer, before, arguments, ffn)
        x, y = after.chunk(2)
        for group in SHOWN:
            self._compare(number, group, x, y)

    def _anywhere(self, skips: bool, attention: float, ffn: float) -> None:
        """Theorem 3: nothing differs before the first layer that skips, nor behind in it."""
        equal = not any(self.anywhere.values())
        if equal and not skips:
            return
        moved = 0.0 if equal else 2 * attention
        behind = 0.0 if equal else self.anywhere["behind"] + moved + 2 * ffn
        self.anywhere = {"skipped": self.anywhere["skipped"] + moved + (1 if skips else 2) * ffn, "behind": behind}

    def _local(
        self, number: int, skips: bool, layer: Any, before: Tensor, arguments: dict[str, Any], ffn: FfnBound
    ) -> None:
        """Theorem 2 with constants from Jacobians, and what the skipped FFN adds."""

        def attend(states: Tensor) -> Tensor:
            return layer.self_attn(hidden_states=layer.input_layernorm(states), **arguments)[0]

        attended = before + attend(before)
        error = self.local
        if sources := [group for group in GROUPS if error[group].any()]:
            gains = self._attention_gains(attend, before, sources)
            for (to, source), values in gains.items():
                self.found.add(number, f"constants.attention.{to} from {source}", values)
            error = {to: error[to] + sum(gains[to, source] * error[source] for source in sources) for to in GROUPS}
            taken = GROUPS[1:] if skips else GROUPS
            for group in taken:
                gain = self._ffn_gains(layer, attended, group)
                self.found.add(number, f"constants.ffn.{group}", gain)
                error[group] = error[group] * (1 + gain)
        if skips:
            error = error | {"skipped": error["skipped"] + self._added(number, layer, attended, ffn)}
        self.local = error

    def _attention_gains(self, attend: Any, states: Tensor, sources: list[str]) -> dict[tuple[str, str], Tensor]:
        """By (to, from), [samples]: the largest gain of attention from tokens of one group to those of another."""
        gains = {}
        x, y = states.chunk(2)
        masks = {group: _twice(getattr(self.kinds, group)).unsqueeze(-1).to(states) for group in GROUPS}
        start = _start(x, y)
        for to in GROUPS:
            for source in sources:
                found = [
                    largest_gain(attend, point, start, masks[source], masks[to], (1, 2), self.steps)
                    for point in _between(x, y)
                ]
                gains[to, source] = _most(found)[self.samples.to(states.device)].double().cpu()
        return gains

    def _ffn_gains(self, layer: Any, attended: Tensor, group: str) -> Tensor:
        """[samples]: the largest gain of the FFN and its norm over the tokens of a group."""
        x, y = attended.chunk(2)
        mask = getattr(self.kinds, group).to(x.device)
        one = torch.ones((), device=x.device, dtype=x.dtype)

        def run(states: Tensor) -> Tensor:
            return layer.mlp(layer.post_attention_layernorm(states))

        taken = x[mask], y[mask]
        start = _start(*taken)
        found = [largest_gain(run, point, start, one, one, (-1,), self.steps) for point in _between(*taken)]
        gains = torch.zeros(mask.shape, device=x.device, dtype=x.dtype)
        gains[mask] = _most(found)
        return gains.amax(dim=1)[self.samples.to(x.device)].double().cpu()

    def _added(self, number: int, layer: Any, attended: Tensor, ffn: FfnBound) -> Tensor:
        """[samples], the bound b of what the FFN would have added to the skipped tokens of a sample."""
        y = attended.chunk(2)[1]
        mask = self.kinds.skipped.to(y.device)
        states = y[mask]
        normed = layer.post_attention_layernorm(states)
        lengths = states.norm(dim=-1).double()
        added = {
            "global": torch.full_like(lengths, ffn.anywhere),
            "norm": ffn.at(normed.norm(dim=-1).double()),
            "product": ffn.down.at(hidden_product(layer.mlp, normed).norm(dim=-1).double()),
            "actual": layer.mlp(normed).norm(dim=-1).double(),
        }
        for larger, smaller in zip(ONE_LAYER, ONE_LAYER[1:], strict=False):
            self.found.check("one_layer", added[larger], added[smaller])
        for name, values in added.items():
            self.found.add(number, f"one_layer.{name}", values / lengths)
        squares = torch.zeros(mask.shape, dtype=torch.float64, device=y.device)
        squares[mask] = added["product"] ** 2
        return squares.sum(dim=1).sqrt()[self.samples.to(y.device)].cpu()

    def _compare(self, number: int, shown: str, x: Tensor, y: Tensor) -> None:
        """What is measured after a layer, and that the bounds are above it."""
        group = "behind" if shown == "text" else shown
        mask = getattr(self.kinds, shown).to(x.device)
        lengths = (y - x).norm(dim=-1).double() * mask, x.norm(dim=-1).double() * mask
        self.found.add(number, f"{shown}.per_token", (lengths[0] / lengths[1])[mask])
        rows = self.samples.to(x.device)
        error, size = (length.norm(dim=1)[rows].cpu() for length in lengths)
        count = mask.sum(dim=1)[rows].cpu()
        has = count > 0  # a prompt may end with its image
        self.found.add(number, f"{shown}.measured", (error / size)[has])
        if self.bounds is not None:
            uppers = {"local": self.local[group], "global": self.anywhere[group] * count.double().sqrt()}
            for name, upper in uppers.items():
                self.found.check(name, upper, error)
                self.found.add(number, f"{shown}.{name}", (upper / size)[has])


def _twice(mask: Tensor) -> Tensor:
    return torch.cat([mask, mask])


def _between(x: Tensor, y: Tensor) -> list[Tensor]:
    """The points of `POINTS` from x to y, each pair as one tensor."""
    return [torch.cat([x + first * (y - x), x + second * (y - x)]) for first, second in POINTS]


def _most(found: list[Tensor]) -> Tensor:
    """The largest gain over all points: pairs [2N] -> [N]."""
    return torch.stack([half for gains in found for half in gains.chunk(2)]).amax(dim=0)


def _start(x: Tensor, y: Tensor) -> Tensor:
    """First directions for both points of a pair: the difference itself, and signs that differ by channel.

    It depends on a token's own states alone, so padding does not change it.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, x.shape[-1:], generator=generator).to(x) * 2 - 1
    difference = y - x
    scale = difference.abs().amax(dim=-1, keepdim=True).clamp_min(0.1 * x.abs().mean(dim=-1, keepdim=True))
    return torch.cat([difference + 0.1 * scale * signs * (1 + x.tanh())] * 2)


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what `measure` gives: the error by layer with its bounds, and what one FFN adds. Returns the files."""
    files = [folder / "error-of-skipping.png"]
    layers, bounded = result["layers"], result["left_out"] is None
    numbers = [row["layer"] for row in layers]
    with figure(files[0], (10, 4), ncols=2, sharey=True) as both:
        for axes, kind in zip(both, SHOWN, strict=True):
            for name in ("global", "local", "measured") if bounded else ("measured",):
                _line(axes, numbers, [row[kind][name] for row in layers], CURVES[name])
            title = "skipped tokens" if kind == "skipped" else "text behind them"
            _layer_axes(axes, title, len(layers))
        both[0].set_ylabel("error, |y - x| / |x|")
        both[0].legend()
    if bounded:
        files.append(folder / "one-layer-bound.png")
        with figure(files[1]) as axes:
            rows = [row for row in layers if "one_layer" in row]
            for name in ONE_LAYER:
                label = name if name == "actual" else f"{name}: a bound"
                _line(axes, [row["layer"] for row in rows], [row["one_layer"][name] for row in rows], label)
            _layer_axes(axes, "what one FFN adds to a skipped token", len(layers))
            axes.set_ylabel("|FFN(n)| / |x|, and its bounds")
            axes.legend()
    return files


def _layer_axes(axes: Any, title: str, layers: int) -> None:
    axes.set(title=title, xlabel="layer", yscale="log", xlim=(-0.5, layers - 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def _line(axes: Any, numbers: list[int], values: list[dict[str, float]], name: str) -> None:
    """A median with the band of the middle half; what is zero or unknown is not on an axis of powers of ten."""
    shown = [(n, value) for n, value in zip(numbers, values, strict=True) if value["q50"]]
    where = [n for n, _ in shown]
    axes.plot(where, [value["q50"] for _, value in shown], marker="o", markersize=3, label=name)
    axes.fill_between(where, [v["q25"] for _, v in shown], [v["q75"] for _, v in shown], alpha=0.2)
