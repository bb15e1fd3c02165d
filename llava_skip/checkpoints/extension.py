"""The extension of a pretrained resampler to more scales and queries, under the names of the paper's code.

Rules and names: method, section 1 C; LLaVA conventions, section 5.4.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt

from torch import Tensor

from llava_skip_base.errors import UserError

_QUERY = re.compile(r"cls_token_w(\d+)_q(\d+)$")
_READER = re.compile(r"(attn|mlp|ln)_0_w(\d+)_l(\d+)_q(\d+)\.")


@dataclass(frozen=True)
class Extension:
    """How each scale of a larger resampler comes from one of a smaller.

    Attributes:
        source: for each new scale, the index of the old scale that it copies.
        window_factors: new window / old window.
        query_factors: new queries / old queries, a square number.
        side: features on a side of the old resampler.
        windows: the old scales' windows.
        queries: the old scales' numbers of queries.
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
            raise UserError(
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
        weights: by the paper's names after `prefix`; what belongs to no scale is kept.
        extension: the rule.
        prefix: for example `model.mm_projector.`.

    Raises:
        UserError: a scale of the source is not in `weights`.
    """
    scaled = {}
    for number, (source, window, queries) in enumerate(extension.scales()):
        old = (extension.windows[source], extension.queries[source])
        names = [name for name in weights if _scale_of(name.removeprefix(prefix)) == old]
        if not any(_QUERY.match(name.removeprefix(prefix)) for name in names):
            raise UserError(f"The weights hold no scale with windows of {old[0]} and {old[1]} queries.")
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


_SOURCES = {"res224": (16, (16, 4)), "res336": (24, (24, 6))}
"""Beginning of a rule's name -> features on a side, and windows, of the pretrained resampler with 80 queries."""

# Rule -> source of each new scale, window factors, query factors (LLaVA conventions, section 5.4).
_RULES: dict[str, tuple[tuple[int, ...], tuple[str, ...], tuple[int, ...]]] = {
    "res224to448_80to80": ((0, 1), ("2", "2"), (1, 1)),
    "res224to448_80to336": ((0, 0, 1), ("2", "1", "1"), (1, 4, 4)),
    "res224to448_80to1104": ((0, 1, 1), ("2", "2", "1/2"), (1, 1, 16)),
    "res224to448_80to1104_reverse": ((1, 0, 1), ("1/2", "2", "2"), (16, 1, 1)),
    "res224to448_80to1296": ((0, 0, 1), ("2", "1/2", "1/2"), (1, 16, 16)),
    "res224to448_80to1296_v2": ((0, 1, 1), ("2", "1", "1/2"), (1, 4, 16)),
    "res224to448_80to1360": ((0, 0, 1, 1), ("2", "1", "1", "1/2"), (1, 4, 4, 16)),
    "res224to448_80to1360_v2": ((0, 1, 1, 1), ("2", "2", "1", "1/2"), (1, 1, 4, 16)),
    "res224to448_80to1360_v3": ((0, 1, 0, 1), ("2", "2", "1/2", "1/2"), (1, 1, 16, 16)),
    "res224to448_80to1552_v1": ((0, 0, 1, 1), ("2", "1/2", "1", "1/2"), (1, 16, 4, 16)),
    "res224to448_80to2320": ((0, 0, 1, 1), ("2", "1/4", "1", "1/2"), (1, 64, 4, 16)),
    "res224to448_80to5392_v1": ((0, 0, 1, 1), ("2", "1/2", "1/2", "1/4"), (1, 16, 16, 64)),
    "res224to448_80to5392_v2": ((0, 1, 1, 1), ("2", "1", "1/2", "1/4"), (1, 4, 16, 64)),
    "res224to672_80to1296_v2": ((0, 1, 1), ("3", "3/2", "3/4"), (1, 4, 16)),
    "res224to672_80to2896_v2": ((0, 1, 1), ("3", "1", "1/2"), (1, 9, 36)),
    "res224to672_80to2960": ((0, 0, 1, 1), ("3", "3/2", "1", "1/2"), (1, 4, 9, 36)),
    "res224to672_80to3040": ((0, 0, 1, 1), ("3", "1", "1", "1/2"), (1, 9, 9, 36)),
    "res224to672_80to3152": ((0, 1, 1, 1), ("3", "3/2", "1", "1/2"), (1, 4, 9, 36)),
    "res224to896_80to1296_v2": ((0, 1, 1), ("4", "2", "1"), (1, 4, 16)),
    "res336_80to80": ((0, 1), ("2", "2"), (1, 1)),
    "res336to448_80to80": ((0, 1), ("4/3", "4/3"), (1, 1)),
    "res336to448_80to336": ((0, 0, 1), ("4/3", "2/3", "2/3"), (1, 4, 4)),
    "res336to448_80to1296": ((0, 0, 1), ("4/3", "1/3", "1/3"), (1, 16, 16)),
}
EXTENSIONS: dict[str, Extension] = {
    name: Extension(source, tuple(Fraction(f) for f in windows), queries, *_SOURCES[name[:6]], queries=(16, 64))
    for name, (source, windows, queries) in _RULES.items()
}
"""The extensions of the paper's code whose numbers are known, by its names."""
