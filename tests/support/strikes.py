"""Sends a process a signal at an exact place; as a program, a training process, struck if STRIKE names its rank."""

import json
import os
import signal
import sys
import time


def strike_at(function: str, call: int, name: str) -> None:
    """Send this process a signal at a call of a function, by its name and the number of the call, or HANG there."""
    calls = 0

    def look(frame, event, argument) -> None:
        nonlocal calls
        # A method that calls the one it overrides is one call.
        if event == "call" and frame.f_code.co_name == function != frame.f_back.f_code.co_name:
            calls += 1
            if calls == call:
                time.sleep(1000) if name == "HANG" else os.kill(os.getpid(), signal.Signals[name])

    sys.setprofile(look)


if __name__ == "__main__":
    from train import train

    rank, *place = json.loads(os.environ.get("STRIKE", "[null]"))
    if os.environ.get("RANK") == str(rank):
        strike_at(*place)
    train.main()
