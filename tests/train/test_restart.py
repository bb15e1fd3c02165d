"""A killed run continues with another number of processes or another ZeRO stage, with the losses of a whole run."""

import os
import shutil
from functools import cache

import pytest
import torch

from llava_skip_base.errors import UserError
from tests.support.interrupted import ROOT, launch_and_wait, outcome, write_inputs
from train.resilience.checkpoint import Manifest, flush, seal
from train.resilience.universal import convert

pytestmark = pytest.mark.slow

STEPS = 8  # with 22 records and 4 in a step: an epoch and two steps
CHANGES = [
    ((2, 2), (1, 2)),
    ((1, 2), (2, 2)),
    ((2, 2), (2, 3)),
    ((2, 3), (2, 2)),
    ((2, 3), (1, 3)),
    ((1, 3), (2, 3)),
    ((2, 2), (1, 3)),
    ((2, 0), (1, 0)),
    ((1, 0), (2, 0)),
]
"""Processes and ZeRO stage (0: without DeepSpeed) before and after."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Attempts at a run of 4 samples a step, without dropout, whose random numbers would differ by process."""
    folder = tmp_path_factory.mktemp("inputs")
    common = [*write_inputs(folder, dropout=0.0), "--max_steps", str(STEPS), "--logging_steps", "1"]
    common += ["--weight_decay", "0.1", "--learning_rates", '{"multi_modal_projector": 3e-3}']

    def attempt(output, began, now, **how):
        batch = ["--per_device_train_batch_size", str(4 // began)]
        zero = ["--deepspeed", str(ROOT / f"scripts/zero{now[1]}.json")] if now[1] else []
        return launch_and_wait([*common, *batch, *zero, "--output_dir", str(output)], processes=now[0], **how)

    @cache
    def killed(before):
        output = tmp_path_factory.mktemp("killed") / "run"
        micro_batches = 5  # the second step after checkpoint-3
        end = attempt(output, before[0], before, strike=(0, "training_step", micro_batches, "SIGKILL"))
        assert end["code"] == 1 and (output / "checkpoint-3/checkpoint.json").is_file(), end["output"]
        return output

    return attempt, killed


@pytest.fixture(scope="module")
def undisturbed(runs, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    end = runs[0](output, 2, (2, 2))
    assert end["code"] == 0, end["output"]
    return outcome(output)


def name(tensor):
    return tensor.replace("language_model.model.", "language_model.")  # ZeRO-3 gathers under transformers' other name


@pytest.mark.parametrize(("before", "after"), CHANGES, ids=lambda run: f"{run[0]}-zero{run[1]}")
def test_a_killed_run_continues_on_other_processes(runs, undisturbed, tmp_path, before, after):
    attempt, killed = runs
    output = tmp_path / "run"
    shutil.copytree(killed(before), output)
    end = attempt(output, before[0], after)
    assert end["code"] == 0, end["output"]
    assert "checkpoint-3 was written by" in end["output"] and "A step has the same samples: " in end["output"]
    assert ("converting it by DeepSpeed's universal checkpointing" in end["output"]) == bool(after[1])
    result = outcome(output)
    assert result["sums"] == pytest.approx(undisturbed["sums"], abs=1e-4)
    logged = [[entry["loss"] for entry in run["history"]] for run in (result, undisturbed)]
    assert len(logged[0]) == STEPS and logged[0] == pytest.approx(logged[1], abs=1e-4)
    expected = {name(key): tensor for key, tensor in undisturbed["weights"].items()}
    for key, tensor in result["weights"].items():
        torch.testing.assert_close(tensor, expected[name(key)], atol=1e-4, rtol=0)
    assert not list(output.glob("checkpoint-*/*universal*"))


def test_a_number_of_processes_that_does_not_fit_is_refused(runs, tmp_path):
    attempt, killed = runs
    shutil.copytree(killed((2, 2)), tmp_path / "run")
    end = attempt(tmp_path / "run", 2, (3, 2))
    assert end["code"] == 2 and "continue with 1, 2, 4 processes" in end["output"], end["output"]
    assert (tmp_path / "run/checkpoint-3/checkpoint.json").is_file()


class Command:
    """Pickled as the call of a function of the system."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("now", [(2, 2), (1, 2)], ids=["as it was", "converted"])
def test_a_foreign_state_runs_no_command(runs, tmp_path, now):
    attempt, killed = runs
    output, proof = tmp_path / "run", tmp_path / "proof"
    shutil.copytree(killed((2, 2)), output)
    checkpoint = output / "checkpoint-3"
    shard = checkpoint / "global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    torch.save(torch.load(shard, weights_only=False) | {"more": Command(proof)}, shard)
    manifest = Manifest.read(checkpoint)
    manifest.files = flush(checkpoint)
    seal(checkpoint, manifest)
    end = attempt(output, 2, now)
    assert end["code"] == 2 and "optim_states.pt names posix.system, which no run saves" in end["output"]
    assert not proof.exists()
    assert not list(checkpoint.glob("*universal*"))


def test_the_conversion_opens_nothing_freely(runs, tmp_path):
    """What stands behind the check of the states, should a file change after it."""
    source = shutil.copytree(runs[1]((2, 2)) / "checkpoint-3", tmp_path / "checkpoint-3")
    shard, proof = source / "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt", tmp_path / "proof"
    torch.save(torch.load(shard, weights_only=False) | {"more": Command(proof)}, shard)
    with pytest.raises(UserError, match=r"cannot be converted .*cannot be read as data"):
        convert(source, 3)
    assert not proof.exists() and not list(source.glob("*universal*"))
