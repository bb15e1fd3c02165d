"""Evaluation: one runner, one file a benchmark, scoring that also works on saved prediction files alone."""
