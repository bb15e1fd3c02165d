import pytest

from train.resilience.watchdog import Report, find_culprits


def report(ticks=9, marks=4, waiting=True):
    return Report(ticks, marks, waiting, "computing step 2", "node")


@pytest.mark.parametrize(
    ("now", "culprits"),
    [
        ({0: report(), 1: report(), 2: report()}, []),
        ({0: report(), 1: report(marks=3), 2: report()}, [1]),
        ({0: report(), 1: report(waiting=False), 2: report()}, [1]),
        ({0: report(marks=3), 1: report(), 2: report(ticks=5)}, [2]),
        ({0: report(marks=3), 1: report(marks=3), 2: report(waiting=False)}, [0, 1]),
    ],
    ids=["all alike", "behind", "not waiting", "silent", "two behind"],
)
def test_the_ranks_that_others_wait_for(now, culprits):
    earlier = {rank: report(ticks=5) for rank in now}
    assert find_culprits(earlier, now) == culprits
