"""A checkpoint from a stranger never runs a command: what its states name is read, and refused, before it is made."""

import os
import pickle
from contextlib import suppress

import pytest
import torch

from llava_skip_base.errors import UserError
from train.resilience.loading import check_states, only_data


class Command:
    """Pickled as the call of a function of the system."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


WRITERS = {
    "zip": lambda content, file: torch.save(content, file),
    "the old form of torch.save": lambda content, file: torch.save(content, file, _use_new_zipfile_serialization=False),
    "a plain pickle": lambda content, file: file.write_bytes(pickle.dumps(content)),
}


@pytest.fixture(params=WRITERS)
def hostile(request, tmp_path):
    """A checkpoint with a state that runs a command when it is opened, and the file that the command makes."""
    folder = tmp_path / "checkpoint-3/global_step3"
    folder.mkdir(parents=True)
    WRITERS[request.param]({"module": Command(tmp_path / "proof")}, folder / "mp_rank_00_model_states.pt")
    return folder.parent, tmp_path / "proof"


def test_a_state_that_runs_a_command_is_refused_unopened(hostile):
    checkpoint, proof = hostile
    with pytest.raises(UserError, match=r"mp_rank_00_model_states.pt .*may run commands when it is opened"):
        check_states(checkpoint)
    assert not proof.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_caller_can_open_a_file_freely(hostile):
    checkpoint, proof = hostile
    state = checkpoint / "global_step3/mp_rank_00_model_states.pt"
    with pytest.raises(UserError, match="cannot be read as data"), only_data(deepspeed=True):
        torch.load(state, weights_only=False)
    assert not proof.exists()
    with suppress(RuntimeError):  # the command has given a number, where a plain pickle needs another
        torch.load(state, weights_only=False)
    assert proof.exists()  # so the file is what the test says


def test_a_foreign_function_is_named(tmp_path):
    torch.save({"optimizer": print}, tmp_path / "scheduler.pt")
    with pytest.raises(UserError, match=r"scheduler.pt names (builtins|__builtin__).print, which no run saves"):
        check_states(tmp_path)


def test_what_deepspeed_saves_is_read(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = DynamicLossScaler(2.0, 2.0, 10, 1, 1, False)
    state = {"zero_stage": ZeroStageEnum.weights, "address": fragment_address(3, 4), "scaler": LossScaler(8.0)}
    torch.save(state | {"dynamic": scaler, "shape": torch.Size([2]), "type": torch.bfloat16}, tmp_path / "state.pt")
    check_states(tmp_path)
    with only_data(deepspeed=True):
        read = torch.load(tmp_path / "state.pt", weights_only=False)
    assert read["zero_stage"] is ZeroStageEnum.weights and read["address"] == fragment_address(3, 4)
    assert read["scaler"].cur_scale == 8.0 and read["dynamic"].cur_scale == 2.0


@pytest.mark.parametrize("name", ["TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_the_variables_of_the_user_are_as_before(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with only_data(deepspeed=False):
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
        assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
    assert os.environ[name] == "1"
