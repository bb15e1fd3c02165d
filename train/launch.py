"""torchrun without its traceback: `python -m train.launch [torchrun options] -m train.train [arguments]`."""

from __future__ import annotations

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from train.train import USER_ERROR


def main() -> None:
    """Start the processes; leave with the exit code of the first one that failed."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main(sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != USER_ERROR:
            sys.stderr.write(f"error: rank {rank} ended with code {failure.exitcode}; its output is above.\n")
        raise SystemExit(failure.exitcode if failure.exitcode > 0 else 1) from None


if __name__ == "__main__":
    main()
