"""Runs the library against a folder of golden tensors: `python -m tests.conformance DIR`."""

from tests.conformance.goldens import Comparison, Golden, GoldenFolder
from tests.conformance.kinds import UnknownKind, check_golden, check_table

__all__ = ["Comparison", "Golden", "GoldenFolder", "UnknownKind", "check_golden", "check_table"]
