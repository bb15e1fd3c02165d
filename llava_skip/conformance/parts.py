"""Goldens of single parts: class-attention selection, merging, summaries."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_skip.conformance.goldens import Comparison, Golden, close, close_gradient, same
from llava_skip.tokens import SummaryLayer, merge_choices, merge_tokens, retained_first, retained_order


def check_selection(golden: Golden) -> list[Comparison]:
    """`cls_attention` over class token and patches -> the kept patches, the others, and the reordered states."""
    results = []
    for case, (entry, t) in golden.cases().items():
        scores, keep = t["cls_attention"].sum(dim=1)[:, 1:], entry["retained"]
        order = retained_order(scores, keep)
        results += [
            same(f"{case} retained patches", order[:, :keep], t["retained_patches"]),
            same(f"{case} other patches", order[:, keep:], t["other_patches"]),
            close(f"{case} output", retained_first(t["hidden_states"][:, 1:], scores, keep), t["out"]),
        ]
    return results


def check_merge(golden: Golden) -> list[Comparison]:
    """Tokens -> centrality, order, targets, merged tokens and their gradient; with ties only the set of rows."""
    results = []
    for case, (entry, t) in golden.cases().items():
        x = t["x"].requires_grad_()
        out = merge_tokens(x, entry["keep"])
        expected = t["out"].reshape(out.shape)
        if entry["ties"]:
            results.append(close(f"{case} set of rows", _sorted_rows(out), _sorted_rows(expected)))
            continue
        centrality, order, target = merge_choices(x, entry["keep"])
        results += [
            close(f"{case} centrality", centrality, t["centrality"]),
            same(f"{case} order", order, t["order"]),
            same(f"{case} targets", target, t["dst_index"]),
            close(f"{case} output", out, expected),
        ]
        if "grad_x" in t:
            (gradient,) = torch.autograd.grad((out * t["grad_weight"].reshape(out.shape)).sum(), x)
            results.append(close_gradient(f"{case} gradient", gradient, t["grad_x"]))
    return results


def check_summary(golden: Golden) -> list[Comparison]:
    """Groups of tokens -> softmax weights and the pooled vector of both summaries."""
    results = []
    for case, (entry, t) in golden.cases().items():
        layer = SummaryLayer(t["image_features"].shape[-1])
        layer.norm.eps = entry.get("layernorm_eps", layer.norm.eps)
        layer.load_state_dict({_summary_name(n): v for n, v in t.items() if n.startswith("ada.")})
        for number in (1, 2):
            first, end = entry[f"q{number}_rows"]
            group = t["image_features"][:, first:end]
            results += [
                close(f"{case} weights {number}", layer.weights(group).squeeze(-1), t[f"weights{number}"]),
                close(f"{case} summary {number}", layer(group), t[f"q{number}"]),
            ]
    return results


def _summary_name(original: str) -> str:
    return original.replace("ada.0.", "norm.").replace("ada.1.", "score.")


def _sorted_rows(tokens: Tensor) -> Tensor:
    """Rows of [B, N, C] in lexicographic order within each sample, rounded first so that noise does not reorder."""
    rows = [sorted(sample.detach().round(decimals=5).tolist()) for sample in tokens]
    return torch.tensor(rows)
