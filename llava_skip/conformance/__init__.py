"""Runs the library against a folder of golden tensors: `python -m llava_skip.conformance DIR`."""

from llava_skip.conformance.goldens import Comparison, Golden, GoldenFolder
from llava_skip.conformance.kinds import UnknownKind, check_golden, check_table

__all__ = ["Comparison", "Golden", "GoldenFolder", "UnknownKind", "check_golden", "check_table"]
