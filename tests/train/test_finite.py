"""A run that diverges ends before a loss, gradient or weight that is not finite displaces what was good."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llava_skip_base.exits import TRAINING_ERROR
from tests.support.interrupted import launch_and_wait, write_inputs
from tests.support.runs import ROOT, train
from train.resilience.finite import MOST_SKIPPED, FiniteChecks, NotFinite
from train.train import _train_or_explain
from train.trainer import SkipTrainer


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    given = write_inputs(tmp_path_factory.mktemp("inputs"))
    return [*given, "--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "1"]  # step 1 has the rate 0


def written(output, what, rank=0):
    return json.loads((output / f"nonfinite_{what}.rank{rank}.json").read_text())


def exported(output):
    return [path.name for path in output.glob("*.safetensors")]


def test_weights_that_are_not_finite_are_not_exported(arguments, tmp_path):
    with pytest.raises(NotFinite, match=r"step 2 left weights that are not finite, of \d+ trained tensors \d+ \("):
        train(tmp_path / "run", *arguments, "--learning_rate", "1e38", "--max_steps", "2", "--save_strategy", "no")
    found = written(tmp_path / "run", "weights")
    assert found["step"] == 2 and found["learning_rate"] == 1e38 and len(found["record_ids"]) == 4
    assert len(found["tensors"]) > 10 and not any("vision_tower" in name for name in found["tensors"])
    assert not exported(tmp_path / "run") and not (tmp_path / "run/train_result.json").exists()


def test_a_checkpoint_that_is_not_finite_does_not_displace_a_good_one(arguments, tmp_path):
    with pytest.raises(NotFinite, match=r"run/checkpoint-1 was kept: --model .*run/checkpoint-1, and another OUTPUT"):
        train(tmp_path / "run", *arguments, "--learning_rate", "1e38", "--max_steps", "3", "--save_steps", "1")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    kept = load_file(tmp_path / "run/checkpoint-1/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values()) and not exported(tmp_path / "run")


@pytest.mark.parametrize(("clip", "value"), [("1", math.inf), ("0", math.inf), ("1", math.nan)])
def test_a_gradient_that_is_not_finite_ends_the_run_before_the_update(arguments, tmp_path, monkeypatch, clip, value):
    step = SkipTrainer.training_step

    def spoil(trainer, model, inputs, *more):
        loss = step(trainer, model, inputs, *more)
        if trainer.state.global_step == 1:
            model.lm_head.weight.grad[3, 5] = value
        return loss

    monkeypatch.setattr(SkipTrainer, "training_step", spoil)
    with pytest.raises(NotFinite, match=r"the gradient of step 2 is not finite: 1 \(lm_head.weight\) \(norm") as end:
        train(tmp_path / "run", *arguments, "--max_steps", "3", "--save_steps", "1", "--max_grad_norm", clip)
    assert end.value.of_all_ranks and "checkpoint-1 was kept" in str(end.value)
    found = written(tmp_path / "run", "gradient")
    assert found["step"] == 2 and found["tensors"] == ["lm_head.weight"] and len(found["record_ids"]) == 4


def checks_of(model=None, fp16=False, folder="."):
    """Checks of a trainer that has one step behind it."""
    model = model or torch.nn.Linear(2, 2)
    arguments = SimpleNamespace(fp16=fp16, output_dir=str(folder), process_index=0, device=torch.device("cpu"))
    accelerator = SimpleNamespace(reduce=lambda flags, reduction: flags)
    trainer = SimpleNamespace(
        args=arguments, state=SimpleNamespace(global_step=1), optimizer=None, model=model, accelerator=accelerator
    )
    return FiniteChecks(trainer)


def test_half_precision_may_look_for_its_scale_but_not_for_ever(tmp_path):
    checks = checks_of(fp16=True, folder=tmp_path)
    for norm in [math.inf, math.nan] * 3 + [1.0] + [math.inf] * (MOST_SKIPPED - 1) + [None]:
        checks.note_norm(norm)
    with pytest.raises(NotFinite, match=f"step 2, like those of the {MOST_SKIPPED - 1} steps before it, is not finite"):
        checks.note_norm(torch.tensor(math.nan))


@pytest.mark.parametrize("norm", [math.inf, math.nan, -1.0])
def test_every_norm_that_is_none_is_refused(tmp_path, norm):
    with pytest.raises(NotFinite, match=r"the gradient of step 2 is not finite \(norm"):
        checks_of(folder=tmp_path).note_norm(norm)


def test_a_norm_on_a_device_is_checked_when_the_next_loss_is(tmp_path, monkeypatch):
    checks = checks_of(folder=tmp_path)
    checks.note_loss(torch.tensor(1.0), ["one"])
    checks.check_loss()
    monkeypatch.setattr("train.resilience.finite._Copy", SlowCopy)
    checks.note_norm(torch.tensor(math.nan))
    checks._trainer.state.global_step += 1
    checks.note_loss(torch.tensor(2.0), ["two"])
    with pytest.raises(NotFinite, match="the gradient of step 2 is not finite"):
        checks.check_loss()
    assert written(tmp_path, "gradient")["record_ids"] == ["one"]
    checks.note_norm(torch.tensor(math.nan))
    with pytest.raises(NotFinite, match="the gradient of step 3"):  # nothing is saved before the norm is known
        checks.check_weights()


class SlowCopy:
    """A number that is not there yet."""

    is_there = False

    def __init__(self, number):
        self.read = number.item


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_element_of_any_type_is_found(tmp_path, dtype, value):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).to(dtype)
    model[0].weight.ds_tensor = torch.tensor([], dtype=dtype)  # a rank may have nothing of a tensor under ZeRO-3
    checks = checks_of(model, folder=tmp_path)
    checks.check_weights()
    model[1].weight.ds_tensor = torch.tensor([1.0, value], dtype=dtype)
    with pytest.raises(NotFinite, match=r"of 4 trained tensors 1 \(1.weight\)"):
        checks.check_weights()
    model[1].weight.requires_grad = False  # training did not do it
    checks.check_weights()


@pytest.mark.parametrize("everywhere", [True, False])
def test_the_exit_code_is_that_of_a_loss_and_one_rank_speaks(monkeypatch, capsys, everywhere):
    codes, waited = [], []
    monkeypatch.setattr("os._exit", codes.append)
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")

    def diverge(run, checkpoint):
        raise NotFinite("step 3", of_all_ranks=everywhere)

    monkeypatch.setattr("train.train.train", diverge)
    _train_or_explain(None, None)
    assert codes == [TRAINING_ERROR] and bool(waited) == everywhere and "step 3" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_every_zero_stage_keeps_the_last_finite_checkpoint(arguments, tmp_path, zero):
    settings = json.loads((ROOT / f"scripts/{zero}.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    output = tmp_path / "run"
    more = ["--deepspeed", str(tmp_path / "zero.json"), "--per_device_train_batch_size", "2", "--save_steps", "1"]
    end = launch_and_wait([*arguments, *more, "--learning_rate", "1e38", "--output_dir", str(output)])
    assert end["code"] == TRAINING_ERROR, end["output"]
    assert end["output"].count("error:") == 1 and "step 2 left weights that are not finite" in end["output"]
    assert [path.parent.name for path in output.glob("checkpoint-*/checkpoint.json")] == ["checkpoint-1"]
    assert not exported(output) and all(len(written(output, "weights", rank)["record_ids"]) == 2 for rank in (0, 1))
