"""Which `SkipConfig` a golden was made with, and in which order the paper's code puts its output tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_skip.configuration import SkipConfig

# Fields of a family's SkipConfig that are not in the index. Which skipped tokens keep their FFN is read from the token
# orders of a file; the fields here are for files without orders.
_FAMILIES: dict[str, dict[str, Any]] = {
    "A": {},
    "B": {},
    "C": {"ffn_tail": 1, "forget_cache": False},
    "Ctest": {"ffn_tail": 1},
    "Blast": {"ffn_tail": 1},
    "C1q": {"ffn_tail": 1},
    "C2last": {"ffn_tail": 2},
    "Cformerlast": {"ffn_head": 1, "ffn_tail": 1},
    "Chalf": {"ffn_every": 2},
    "Chalflayer": {"skipping_layers": "odd"},
    "Cinit": {"summary_start": "mean"},
    "Cnolast": {},
    "Csdpa": {"ffn_tail": 1, "text_sees_skipped": False},
}
_KEPT_BEFORE_FIRST_SUMMARY = {"C", "Ctest", "C2last", "Cformerlast", "C1q", "Csdpa"}
"""Families whose output has the skipped tokens that keep their FFN before the first summary."""


_KINDS = {"A": "A", "B": "B", "C": "Ctest"}
"""Kind of an end-to-end file -> the family of its language model: the one that drops skipped keys in decoding."""


def family_of(entry: dict[str, Any]) -> str | None:
    """The family of a file, from its entry."""
    return entry["family"] if "family" in entry else _KINDS.get(entry.get("kind", ""))


def is_known_family(family: str | None) -> bool:
    """Whether `skip_of` knows the configuration of a family."""
    return family in _FAMILIES


def skip_of(entry: dict[str, Any], tensors: dict[str, Tensor]) -> SkipConfig:
    """The configuration of a language-model golden: sizes from its entry, the rest from orders, tensors and family."""
    retained, skipped = entry["retained"], entry["skipped"]
    fields = dict(_FAMILIES[family_of(entry) or ""])
    if fields.pop("skipping_layers", None) == "odd":
        fields["layers"] = tuple(range(1, entry["config"]["num_hidden_layers"], 2))
    second = (retained, retained + skipped)
    summaries = {0: (), 1: (second,), 2: ((entry.get("coarse", 0), retained), second)}[entry.get("summaries", 2)]
    orders = entry.get("orders", {})
    if "main_order" in orders:
        first = entry["image_start"] + retained
        kept = [token - first for token in orders["main_order"] if first <= token < first + skipped]
        fields |= _exceptions(sorted(kept), skipped)
    if "kv_dropped_attn_positions" in orders:
        fields["forget_cache"] = bool(orders["kv_dropped_attn_positions"])
    if "final_im_query" in tensors:
        fields["summary_start"] = "learned"
    mask = tensors.get("attention_mask")
    if fields.get("text_sees_skipped") is False and (mask is None or bool(mask.all())):
        # The paper's code loses its mask when nothing is padded (method, section 10).
        fields["text_sees_skipped"] = True
    return SkipConfig(retained, skipped, summaries=summaries, **fields)


def _exceptions(kept: list[int], skipped: int) -> dict[str, int | None]:
    """The rule that gives the positions, among the skipped tokens, of the tokens that keep their FFN.

    Raises:
        ValueError: no rule of `SkipConfig` gives these positions.
    """
    others = [position for position in range(skipped) if position not in kept]
    head, tail = others[0], skipped - 1 - others[-1]
    if head + tail == len(kept):
        return {"ffn_head": head, "ffn_tail": tail, "ffn_every": None}
    every = kept[1] - kept[0]
    if kept == list(range(0, skipped, every)):
        return {"ffn_head": 0, "ffn_tail": 0, "ffn_every": every}
    raise ValueError(f"the skipped tokens {kept} keep their FFN, which is neither head and tail nor every k-th")


def output_order(entry: dict[str, Any], skip: SkipConfig) -> Tensor:
    """Attention position of each output token of the paper's code, -1 for zeros [T].

    It gives zeros for the tokens that skip, before the retained ones, and moves the skipped tokens that keep their
    FFN (method, section 6); here every token stays at its position in attention.
    """
    orders = entry.get("orders", {})
    if "out_order" in orders:
        positions = {token: position for position, token in enumerate(orders["attn_order"])} | {-1: -1}
        return torch.tensor([positions[token] for token in orders["out_order"]])
    start, family = entry["image_start"], family_of(entry)
    block = range(start, start + skip.length)
    kept = [position for position, skipping in zip(block, skip.skipping, strict=True) if not skipping]
    if family in _KEPT_BEFORE_FIRST_SUMMARY:
        summaries = [start + position for position in skip.summary_positions]
        kept = [position for position in kept if position not in summaries] + summaries
    zeros = [-1] * skip.num_skipping
    return torch.tensor([*range(start), *zeros, *kept, *range(start + skip.length, entry["length"])])
