"""Exit codes of all programs, besides 0 (finished) and 1 (a traceback says why)."""

NOT_SCORED = 1
"""An evaluation finished without a score: the judge did not grade every answer."""
DISAGREES = 1
"""The library does not agree with the golden tensors."""
FAULTY_RECORDS = 1
"""A data set has records that cannot be trained on."""
KILLED = 1
"""A process of a training run was killed by a signal; the launcher names both."""
USER_ERROR = 2
"""A mistake in the options, the data or the model; one message says what to change."""
TRAINING_ERROR = 3
"""A training run that cannot continue: its loss, gradient or weights are not finite."""
HUNG = 69
"""No process made progress for `--hang_timeout_seconds`; EX_UNAVAILABLE of sysexits.h."""
NOT_SAVED = 74
"""A checkpoint could not be written; EX_IOERR of sysexits.h."""
PREEMPTED = 75
"""The run was asked to stop, and stopped: the same command continues it; EX_TEMPFAIL of sysexits.h."""
EXPLAINED = (USER_ERROR, TRAINING_ERROR, HUNG, NOT_SAVED, PREEMPTED)
"""Codes of a process that has printed why it ended."""
STOPPED_BY = 128
"""Added to the number of the signal that stopped a launcher, as shells have it."""
