"""Chain of sight: trainable queries read the tower's features in windows of several sizes (method, section 1 C).

Shapes: N images, G features a side, w features a side of a window, n queries a window, D width of the queries,
C width of the features.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from llava_skip.products import Products, linear
from llava_skip.tokens import free_parameter
from llava_skip_base.errors import UserError


@dataclass(frozen=True)
class ResamplerConfig:
    """Scales, levels and widths of a resampler.

    Attributes:
        windows: w of each scale, in the order of the output.
        queries: number of queries of each scale; they are dealt evenly to its windows.
        levels: the tower's blocks whose outputs are read, first to last.
        level_offset: what is added to a level to find its entry in transformers' list of hidden states: 1 for towers
            whose blocks count from 0, 0 for checkpoints of the paper's code trained on transformers' CLIP.
        width: of the queries; a head has 64.
    """

    windows: tuple[int, ...]
    queries: tuple[int, ...]
    levels: tuple[int, ...]
    level_offset: int = 1
    width: int = 1024

    def __post_init__(self) -> None:
        for name in ("windows", "queries", "levels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.windows or len(self.windows) != len(self.queries):
            raise UserError(
                f"resampler.windows has {len(self.windows)} scales and resampler.queries {len(self.queries)}: "
                "give both the same number, at least one."
            )
        if not self.levels:
            raise UserError("resampler.levels is empty: name at least one block of the tower.")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ResamplerConfig:
        """Build from the `resampler` entry of a config.json; an unknown field is an error."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise UserError(f"resampler has the unknown fields {unknown}; known fields are {sorted(known)}.")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @property
    def hidden_states(self) -> tuple[int, ...]:
        """Indices into transformers' list of hidden states."""
        return tuple(level + self.level_offset for level in self.levels)

    def check(self, side: int, layers: int) -> None:
        """Raise UserError if the scales do not fit a tower of side x side features and this number of layers."""
        for window, queries in zip(self.windows, self.queries, strict=True):
            count = (side // window) ** 2
            if side % window or queries % count:
                raise UserError(
                    f"resampler: windows of {window} with {queries} queries do not fit {side} x {side} features: the "
                    "window must divide the side, and the number of windows the queries."
                )
        if not all(0 <= index <= layers for index in self.hidden_states):
            raise UserError(
                f"resampler.levels {list(self.levels)} with level_offset {self.level_offset} name layers that a tower "
                f"of {layers} does not have."
            )


def resampler_products(config: ResamplerConfig, features: int, context: int) -> Products:
    """Matrix products of the readers on one image, without the last projection.

    The norms of the features have weights, so that even with a frozen tower the features' products need gradients.

    Args:
        config: of the resampler.
        features: G * G.
        context: C.
    """
    width, weights, states = config.width, 0, 0
    for window, queries in zip(config.windows, config.queries, strict=True):
        weights += linear(queries, width, 10 * width) + linear(features, context, 2 * width)
        states += 2 * linear(queries, width, window**2)
    return Products(weights=weights, states=states) * len(config.levels)


def cut_windows(features: Tensor, window: int) -> Tensor:
    """Features [N, G * G, C] in raster order -> [N, windows, w * w, C], windows row by row, raster order inside."""
    side = int(features.shape[1] ** 0.5)
    count = side // window
    grid = features.unflatten(1, (count, window, count, window))
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class WindowAttention(nn.Module):
    """Queries of a window attend to its features; q, k and v without bias."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.query_norm, self.cont_norm = nn.LayerNorm(width), nn.LayerNorm(context)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(context, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, windows: Tensor) -> Tensor:
        """[N, windows, n, D] and [N, windows, w * w, C] -> [N, windows, n, D]."""
        key, value = self.to_kv(self.cont_norm(windows)).chunk(2, dim=-1)
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(2, 3) for x in (self.to_q(self.query_norm(queries)), key, value)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(2, 3).flatten(-2))


class Reader(nn.Module):
    """What one scale does with one level: attention into the windows, then an MLP, both residual."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.attention = WindowAttention(width, context)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, queries: Tensor, windows: Tensor) -> Tensor:
        """[N, windows, n, D] -> [N, windows, n, D]."""
        queries = queries + self.attention(queries, windows)
        hidden = nn.functional.gelu(self.mlp["fc1"](self.mlp_norm(queries)))
        return queries + self.mlp["fc2"](hidden)


class Scale(nn.Module):
    """One window size: its queries, shared by the levels, and a reader for each level."""

    def __init__(self, window: int, queries: int, levels: tuple[int, ...], width: int, context: int) -> None:
        super().__init__()
        self.window = window
        start = torch.empty(1, queries, width)
        # While a checkpoint is loaded transformers replaces the initialisers by no-ops: the return value is not used.
        nn.init.trunc_normal_(start, std=0.02)
        self.query = free_parameter(start)
        self.readers = nn.ModuleDict({f"l{level}": Reader(width, context) for level in levels})

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features of each level [N, G * G, C] -> [N, queries, D], window after window."""
        count = features[0].shape[1] // self.window**2
        queries = self.query.unflatten(1, (count, -1)).expand(features[0].shape[0], -1, -1, -1)
        for reader, level in zip(self.readers.values(), features, strict=True):
            queries = reader(queries, cut_windows(level, self.window))
        return queries.flatten(1, 2)


class ChainOfSightResampler(nn.Module):
    """All scales, one after another in the configured order, in the language model's width."""

    def __init__(self, config: ResamplerConfig, context: int, text_width: int) -> None:
        super().__init__()
        width = config.width
        self.scales = nn.ModuleDict(
            {
                f"w{window}_q{queries}": Scale(window, queries, config.levels, width, context)
                for window, queries in zip(config.windows, config.queries, strict=True)
            }
        )
        self.ln_out, self.out_proj = nn.LayerNorm(width), nn.Linear(width, text_width)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features of each level without class token [N, G * G, C] -> [N, all queries, text width]."""
        tokens = torch.cat([scale(features) for scale in self.scales.values()], dim=1)
        return self.out_proj(self.ln_out(tokens))
