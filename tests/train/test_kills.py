"""Random kills of one of two processes under ZeRO: the run ends as if nothing had happened, bit for bit."""

import random
import signal

import pytest
import torch

from tests.support.interrupted import ROOT, Attempts, outcome, write_inputs

pytestmark = pytest.mark.slow

BETWEEN = ("training_step", "compute_loss", "get_batch_samples", "encode_conversation", "on_step_end")
"""Functions of a step, each called once or some times in it; a checkpoint is written every third step."""
SAVING = ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "progress", "flush", "seal", "on_save")
"""Functions that run while a checkpoint is written, in this order; `seal` on rank 0 alone."""
KILLS = 10
"""For each stage; at least half of them between checkpoints."""


@pytest.fixture(scope="module")
def attempt():
    attempts = Attempts()
    yield attempts
    attempts.close()


def places(seed):
    """Random places: a rank, a function, and the number of its call."""
    chance = random.Random(seed)
    kinds = [BETWEEN] * (KILLS - KILLS // 3) + [SAVING] * (KILLS // 3)
    chance.shuffle(kinds)
    for kind in kinds:
        function = chance.choice(kind)
        rank = 0 if function == "seal" else chance.randrange(2)
        yield rank, function, 1 if kind is SAVING else chance.randint(1, 5)


@pytest.mark.parametrize("stage", [2, 3])
def test_random_kills_change_no_bit(attempt, tmp_path, stage):
    common = [*write_inputs(tmp_path), "--per_device_train_batch_size", "2", "--max_steps", "16"]
    common += ["--deepspeed", str(ROOT / f"scripts/zero{stage}.json"), "--output_dir"]
    output, between = tmp_path / "run", 0
    for rank, function, call in places(stage):
        end = attempt([*common, str(output)], function, call, rank=rank, processes=2)
        if end["code"] == 0:  # the run was at its end before that call
            break
        assert end["code"] == -signal.SIGKILL, (function, call, end["output"])
        between += not (output / ".unfinished").exists()
    else:
        assert attempt([*common, str(output)], processes=2)["code"] == 0
    assert attempt([*common, str(tmp_path / "whole")], processes=2)["code"] == 0
    assert between >= KILLS / 2
    whole, result = outcome(tmp_path / "whole"), outcome(output)
    assert all(result[key] == whole[key] for key in ("history", "sums", "logged"))
    assert all(torch.equal(tensor, result["weights"][name]) for name, tensor in whole["weights"].items())
