"""Attempts at a training run, each of which may be struck by a signal at an exact place.

Reads a JSON line for each, `{"arguments": [...], "strike": [0, "function", 2, "SIGKILL"], "processes": 2}` (the strike
begins with a rank), and answers with a line that says how the attempt ended and what it wrote. Attempts are forked from
this process, which has imported everything. As torchrun does, it keeps the store of several processes, and ends the
others when one of them fails.
"""

import json
import os
import signal
import sys
import tempfile

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # imports write to standard output

import deepspeed  # noqa: E402, F401 (takes seconds)
from torch.distributed import TCPStore  # noqa: E402

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


def fork(output, rank: int, processes: int, port: int, arguments: list[str], strike: list | None) -> int:
    """The number of a new process with a rank."""
    if child := os.fork():
        return child
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    if processes > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ.update({name: str(value) for name, value in names.items()})
    try:
        os._exit(run(arguments, strike[1:] if strike and strike[0] == rank else None))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def attempt(arguments: list[str], strike: list | None = None, processes: int = 1) -> dict:
    """The code of the first process that failed, else 0, and what all wrote."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if processes > 1 else None
    with tempfile.TemporaryFile("w+") as output:
        port = store.port if store else 0
        left = {fork(output, rank, processes, port, arguments, strike) for rank in range(processes)}
        code = 0
        while left:
            child, status = os.wait()
            left.discard(child)
            ended = os.waitstatus_to_exitcode(status)
            if ended and not code:
                code = ended
                for other in left:
                    os.kill(other, signal.SIGKILL)
        output.seek(0)
        return {"code": code, "output": output.read()}


if __name__ == "__main__":
    for line in sys.stdin:
        ANSWERS.write(json.dumps(attempt(**json.loads(line))) + "\n")
        ANSWERS.flush()
