"""The extension of a pretrained resampler to more scales and queries, under the names of the paper's code.

Rules and names: method, section 1 C; LLaVA conventions, section 5.4.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt

from torch import Tensor

_QUERY = re.compile(r"cls_token_w(\d+)_q(\d+)$")
_READER = re.compile(r"(attn|mlp|ln)_0_w(\d+)_l(\d+)_q(\d+)\.")


@dataclass(frozen=True)
class Extension:
    """How each scale of a larger resampler comes from one of a smaller.

    Attributes:
        source: for each new scale, the index of the old scale that it copies.
        window_factors: what the old window is multiplied with.
        query_factors: what the old number of queries is multiplied with, a square number.
        side: features a side of the old resampler.
        windows: of the old scales.
        queries: of the old scales.
    """

    source: tuple[int, ...]
    window_factors: tuple[Fraction, ...]
    query_factors: tuple[int, ...]
    side: int
    windows: tuple[int, ...]
    queries: tuple[int, ...]

    def scales(self) -> list[tuple[int, int, int]]:
        """For each new scale: its source, its window and its number of queries."""
        rows = zip(self.source, self.window_factors, self.query_factors, strict=True)
        return [(c, int(self.windows[c] * e), self.queries[c] * r) for c, e, r in rows]

    def query_rows(self, scale: int) -> list[int]:
        """For each query of a new scale, the old query that it copies.

        The queries of an old window are repeated sqrt(factor) times along the rows and the columns of windows.
        """
        source, factor = self.source[scale], self.query_factors[scale]
        count = self.side // self.windows[source]
        each, times = self.queries[source] // count**2, isqrt(factor)
        if times**2 != factor:
            raise ValueError(
                f"query factor {factor} is not a square number: windows are repeated along rows and columns."
            )
        return [
            ((row // times) * count + column // times) * each + query
            for row in range(count * times)
            for column in range(count * times)
            for query in range(each)
        ]


def extend_resampler(weights: dict[str, Tensor], extension: Extension, prefix: str = "") -> dict[str, Tensor]:
    """Weights of the larger resampler, under the paper's names, from those of the smaller.

    Args:
        weights: by the paper's names, `prefix` in front; what belongs to no scale passes through.
        extension: the rule.
        prefix: for example `model.mm_projector.`.

    Raises:
        ValueError: a scale of the source is not in `weights`.
    """
    scaled = {}
    for number, (source, window, queries) in enumerate(extension.scales()):
        old = (extension.windows[source], extension.queries[source])
        names = [name for name in weights if _scale_of(name.removeprefix(prefix)) == old]
        if not any(_QUERY.match(name.removeprefix(prefix)) for name in names):
            raise ValueError(f"The weights hold no scale with windows of {old[0]} and {old[1]} queries.")
        for name in names:
            new = re.sub(r"_w\d+_", f"_w{window}_", re.sub(r"_q\d+", f"_q{queries}", name))
            tensor = weights[name]
            scaled[new] = tensor[:, extension.query_rows(number)] if _QUERY.match(name.removeprefix(prefix)) else tensor
    rest = {name: tensor for name, tensor in weights.items() if _scale_of(name.removeprefix(prefix)) is None}
    return rest | scaled


def _scale_of(name: str) -> tuple[int, int] | None:
    if match := _QUERY.match(name):
        return int(match[1]), int(match[2])
    if match := _READER.match(name):
        return int(match[2]), int(match[4])
    return None
