"""Who is blamed when processes end, and how they end."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from llava_skip_base.exits import NOT_SAVED
from train.launch import find_cause


@pytest.mark.parametrize(
    ("ends", "cause"),
    [
        ({0: (NOT_SAVED, 100), 1: (-9, 100)}, 1),  # rank 0 could not save, because rank 1 was gone
        ({0: (NOT_SAVED, 100), 1: (-9, 130)}, 0),  # rank 1 was killed by the launcher, 30 seconds later
        ({0: (-15, 100), 1: (1, 100)}, 0),
        ({0: (1, 101), 1: (1, 100)}, 1),
    ],
)
def test_the_rank_that_the_others_failed_over_is_named(ends, cause):
    failures = {rank: SimpleNamespace(exitcode=code, timestamp=time) for rank, (code, time) in ends.items()}
    assert find_cause(failures)[0] == cause


TEARDOWN_THAT_ABORTS = """
import atexit, os
from train.resilience.exits import leave

class Aborts:
    def __del__(self):
        os.abort()

kept = Aborts()
atexit.register(print, "reported", end="")
print("written, ", end="")
leave(75)
"""


def test_a_process_leaves_with_everything_written_and_no_teardown():
    end = subprocess.run([sys.executable, "-c", TEARDOWN_THAT_ABORTS], capture_output=True, text=True)
    assert (end.returncode, end.stdout) == (75, "written, reported"), end.stderr
