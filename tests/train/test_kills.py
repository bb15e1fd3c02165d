"""Random kills of one of two processes under ZeRO: the run ends as if nothing had happened, bit for bit.

`KILL_ROUNDS` is the number of runs under each stage, and so that of their kills.
"""

import os
import random
import signal
from functools import cache

import pytest
import torch

from tests.support.interrupted import ROOT, outcome, write_inputs

pytestmark = pytest.mark.slow

BETWEEN = ("training_step", "compute_loss", "get_batch_samples", "encode_conversation", "on_step_end")
"""Functions of a step, each called once or some times in it; a checkpoint is written every third step."""
SAVING = ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "progress", "flush", "seal", "on_save")
"""Functions that run while a checkpoint is written, in this order; `seal` on rank 0 alone."""
KINDS = (BETWEEN, BETWEEN, BETWEEN, SAVING, SAVING)
"""Five kills for each run."""
ROUNDS = int(os.environ.get("KILL_ROUNDS", "1"))


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The arguments of a run under a stage, but for its folder."""
    common = [*write_inputs(tmp_path_factory.mktemp("inputs")), "--per_device_train_batch_size", "2"]
    return lambda stage: [*common, "--deepspeed", str(ROOT / f"scripts/zero{stage}.json"), "--output_dir"]


@pytest.fixture(scope="module")
def whole(attempt, command, tmp_path_factory):
    """The outcome of an undisturbed run under a stage."""

    @cache
    def run(stage):
        output = tmp_path_factory.mktemp("whole") / "run"
        end = attempt([*command(stage), str(output)], processes=2)
        assert end["code"] == 0, end["output"]
        return outcome(output)

    return run


def places(seed):
    """Random places: a rank, a function, and the number of its call."""
    chance = random.Random(seed)
    for kind in chance.sample(KINDS, len(KINDS)):
        function = chance.choice(kind)
        rank = 0 if function == "seal" else chance.randrange(2)
        yield rank, function, 1 if kind is SAVING else chance.randint(1, 5)


@pytest.mark.parametrize("seed", range(1, ROUNDS + 1))
@pytest.mark.parametrize("stage", [2, 3])
def test_random_kills_change_no_bit(attempt, command, whole, tmp_path, stage, seed):
    given, between = [*command(stage), str(tmp_path / "run")], 0
    for rank, function, call in places(10 * stage + seed):
        end = attempt(given, function, call, rank=rank, processes=2)
        assert end["code"] == -signal.SIGKILL, (function, call, end["output"])
        between += not (tmp_path / "run/.unfinished").exists()
    assert between >= len(KINDS) / 2
    end = attempt(given, processes=2)
    assert end["code"] == 0, end["output"]
    expected, result = whole(stage), outcome(tmp_path / "run")
    for key in ("history", "sums", "logged"):
        assert result[key] == expected[key], (key, result[key], expected[key])
    assert all(torch.equal(tensor, result["weights"][name]) for name, tensor in expected["weights"].items())
