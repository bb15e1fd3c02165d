"""Goldens that are tables in JSON: the grids of LLaVA-HD, the extensions of a resampler."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from llava_skip.checkpoints.extension import Extension, extend_resampler
from llava_skip.vision.tiling import choose_grid
from tests.conformance.goldens import Comparison, same


def check_grids(table: dict[str, Any]) -> list[Comparison]:
    """Width, height and most tiles -> columns, rows and crops, with the thumbnail."""
    chosen, expected = [], []
    for case in table["cases"]:
        columns, rows = choose_grid(case["width"], case["height"], case["hd_num"], table["tile"])
        chosen.append([columns, rows, 1 + columns * rows])
        expected.append([case["columns"], case["rows"], case["crops_with_thumbnail"]])
    return [same(f"{len(chosen)} grids", torch.tensor(chosen), torch.tensor(expected))]


def check_extensions(table: dict[str, Any]) -> list[Comparison]:
    """The rule of an extension -> names, the source query of each new one, and the source window of each weight."""
    return [comparison for name, entry in table.items() for comparison in _check_extension(name, entry)]


def _check_extension(name: str, entry: dict[str, Any]) -> list[Comparison]:
    rule = entry["config"]
    windows, queries = rule["original_window_sizes"], rule["original_query_sizes"]
    extension = Extension(
        source=tuple(rule["correspondence"]),
        window_factors=tuple(Fraction(factor).limit_denominator(64) for factor in rule["window_expansion_ratio"]),
        query_factors=tuple(rule["length_repeat_ratio"]),
        side=rule["original_tokens_per_side"],
        windows=tuple(windows),
        queries=tuple(queries),
    )
    prefix = _common_prefix_of_names(entry["new_keys"])
    new = extend_resampler(_numbered_weights(entry, prefix, windows, queries), extension, prefix)
    missing = set(new) ^ set(entry["new_keys"])
    results = [Comparison(f"{name}: names", float(len(missing)), 0.0)]
    for key, rows in entry["query_source_rows"].items():
        results.append(same(f"{name}: queries of {key}", new[key][0, :, 0], torch.tensor(rows)))
    for key, window in entry["copied_from"].items():
        results.append(same(f"{name}: source of {key}", new[key], torch.tensor([int(window.removeprefix("w"))])))
    return results


def _common_prefix_of_names(names: list[str]) -> str:
    first = next(name for name in names if "cls_token_" in name)
    return first[: first.index("cls_token_")]


def _numbered_weights(entry: dict[str, Any], prefix: str, windows: list[int], queries: list[int]) -> dict[str, Tensor]:
    """Small weights to extend: a query is its own number, another weight is the number of its window."""
    levels = {
        part for name in entry["new_keys"] for part in name.split("_") if part.startswith("l") and part[1:].isdigit()
    }
    weights = {
        f"{prefix}cls_token_w{w}_q{q}": torch.arange(q)[None, :, None] for w, q in zip(windows, queries, strict=True)
    }
    tails = {name.rsplit(".to_", 1)[-1] for name in entry["copied_from"] if ".to_" in name}
    for w, q in zip(windows, queries, strict=True):
        weights |= {
            f"{prefix}attn_0_w{w}_{level}_q{q}.to_{tail}": torch.tensor([w]) for level in levels for tail in tails
        }
    return weights | {name: torch.tensor([0]) for name in entry["new_keys"] if "_w" not in name.removeprefix(prefix)}
