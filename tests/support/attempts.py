"""Attempts at a training run, each of which may be struck by a signal at an exact place.

Reads a JSON line for each, `{"arguments": [...], "strike": ["function", 2, "SIGKILL"]}`, and answers with a line that
says how the attempt ended and what it wrote. Attempts are forked from this process, which has imported everything.
"""

import json
import os
import sys
import tempfile

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # imports write to standard output

from tests.support.strikes import strike_at  # noqa: E402
from train import train  # noqa: E402


def run(arguments: list[str], strike: list | None) -> int:
    """What the process that trains does."""
    sys.argv[1:] = arguments
    try:
        if strike:
            strike_at(*strike)
        train.main()
    except SystemExit as end:
        return end.code
    return 0


def attempt(arguments: list[str], strike: list | None = None) -> dict:
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            try:
                os._exit(run(arguments, strike))
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        output.seek(0)
        return {"code": os.waitstatus_to_exitcode(status), "output": output.read()}


if __name__ == "__main__":
    for line in sys.stdin:
        ANSWERS.write(json.dumps(attempt(**json.loads(line))) + "\n")
        ANSWERS.flush()
