"""What kind of golden a file is, from its entry in the index and the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.conformance import models, parts, tables
from tests.conformance.goldens import Comparison, Golden
from tests.conformance.variants import family_of, is_known_family


class UnknownKind(ValueError):
    """A file that no check reads."""


def check_golden(golden: Golden) -> list[Comparison]:
    """Compare the library with one file.

    Raises:
        UnknownKind: no check reads this kind of file.
    """
    return _find_check(golden)(golden)


def check_table(table: Any) -> list[Comparison]:
    """Compare the library with one JSON file.

    Raises:
        UnknownKind: no check reads this kind of file.
    """
    if isinstance(table, dict) and {"tile", "cases"} <= set(table):
        return tables.check_grids(table)
    if isinstance(table, dict) and table and all("query_source_rows" in entry for entry in table.values()):
        return tables.check_extensions(table)
    raise UnknownKind("a table of a kind that is not known")


def _find_check(golden: Golden) -> Callable[[Golden], list[Comparison]]:
    names, entry = golden.names(), golden.entry
    endings = {name.split(".", 1)[-1] for name in names} if "cases" in entry else set()
    if "cls_attention" in endings:
        return parts.check_selection
    if "dst_index" in endings:
        return parts.check_merge
    if "weights1" in endings:
        return parts.check_summary
    if "crops" in endings:
        return parts.check_tiles
    if "window_sizes" in entry:
        return parts.check_resampler
    if "logits" not in names and "lm_head.weight" in names:
        return models.check_language_weights
    if "logits" not in names and "model.mm_projector.0.weight" in names:
        return models.check_vision_weights
    if golden.is_resampler:
        return parts.check_resampler_weights
    family = family_of(entry)
    if "logits" in names and "skip_argument_features" in names and is_known_family(family):
        return models.check_end_to_end
    if "logits" in names and is_known_family(family):
        if "image_features" in names:
            return models.check_language_model
        if "image_start" not in entry:
            return models.check_text_only
    described = f"family {family!r}, " if family else ""
    raise UnknownKind(f"a kind that is not known yet ({described}tensors {sorted(names)[:4]} ...)")
