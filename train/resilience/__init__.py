"""Runs that are interrupted: checkpoints, the run folder, preemption, hangs and exit codes."""
