"""Who is blamed when processes end."""

from types import SimpleNamespace

import pytest

from train.exits import NOT_SAVED
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
