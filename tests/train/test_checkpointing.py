"""`--activation_checkpointing auto`: off where the longest batch fits the free memory."""

from types import SimpleNamespace

import pytest
import torch

from llava_skip import preset_config
from llava_skip.memory import Zero
from llava_skip_base import machine
from llava_skip_base.errors import UserError
from tests.support.small_models import small_config
from train.arguments import ModelArguments, identity, resolved
from train.planning import checkpointing
from train.planning.checkpointing import decide, free_of, settle_checkpointing
from train.planning.estimate import Training
from train.run import parse
from train.train import _train_or_explain

STAGE_2 = ("multi_modal_projector", "summary", "language_model")
GIVEN = ["--data", "x", "--output_dir", "y", "--use_cpu", "true"]


def training(batch, max_length, zero=3):
    return Training(STAGE_2, batch, batch * 8, max_length=max_length, zero=Zero(zero))


def test_it_is_off_where_the_longest_batch_fits():
    """Of the 8B model on 8 processes: few samples fit, many do not; the states of all parameters always count."""
    config = preset_config("sv-llava-100", "llama3-8b")
    few, many = (decide(config, training(batch, 1024), 8, 80, 2) for batch in (1, 16))
    assert not few.on and many.on and few.needed < few.usable < many.needed
    assert many.activations == pytest.approx(16 * few.activations, rel=0.2)
    assert decide(config, training(1, 1024, zero=0), 8, 80, 2).on
    assert "is off: without it the longest batch fits" in str(few) and "does not fit" in str(many)


def test_a_model_that_skips_needs_it_later_than_the_dense_one():
    """At samples of little more than an image, and memory between what both need."""
    needed = {}
    for preset in ("llava-hd", "sv-llava-hd"):
        config = preset_config(preset, "llama3-8b")
        length = config.image_seq_length + 100
        needed[preset] = decide(config, training(4, length), 8, 80, 2).needed
    assert needed["sv-llava-hd"] < 0.6 * needed["llava-hd"]


def test_a_batch_without_images_counts_too():
    """All of its tokens take the FFN."""
    config, own = preset_config("sv-llava-100", "llama3-8b"), training(4, 1024)
    assert (
        decide(config, own, 8, 80, 2).activations > 4 * 1024 * 32 * 4 * 2 * config.text_config.intermediate_size / 2**30
    )


def test_without_a_known_memory_it_is_on():
    assert decide(small_config(), training(1, 64), 1, None, 4).on


@pytest.mark.parametrize(
    ("words", "value"), [(["true"], True), (["FALSE"], False), (["auto"], "auto"), ([], True), (None, False)]
)
def test_the_argument_is_a_switch_or_auto(words, value):
    given = [] if words is None else ["--activation_checkpointing", *words]
    run = parse([*GIVEN, *given])[2]
    assert run.activation_checkpointing == run.gradient_checkpointing == value


def test_other_values_are_refused():
    with pytest.raises(UserError, match="--activation_checkpointing is 'perhaps'; it must be true, false or auto"):
        parse([*GIVEN, "--activation_checkpointing", "perhaps"])


@pytest.mark.parametrize(("others", "on"), [([64.0, 32.0], False), ([64.0, 0.001], True)])
def test_the_rank_with_the_least_memory_decides_for_all(monkeypatch, others, on):
    run = parse([*GIVEN, "--activation_checkpointing", "auto"])[2]
    monkeypatch.setattr(checkpointing, "gather_object", lambda own: [*own, *others])
    monkeypatch.setattr(checkpointing, "free_of", lambda device: 16.0)
    said = settle_checkpointing(ModelArguments(), run, small_config(), 128)
    assert f"is {'on' if on else 'off'}:" in said
    assert run.activation_checkpointing is run.gradient_checkpointing is on
    assert settle_checkpointing(ModelArguments(), run, small_config(), 128) is None


def test_a_run_may_continue_with_another_choice():
    """Of a batch that did not fit, after all."""
    words = ([], ["--activation_checkpointing", "auto"], ["--activation_checkpointing", "true"])
    assert len({str(identity(resolved(*parse([*GIVEN, *own])))) for own in words}) == 1


@pytest.mark.parametrize(("decided", "said"), [(False, True), (True, False)])
def test_a_batch_that_did_not_fit_after_all_is_told_its_cure(monkeypatch, capsys, decided, said):
    def out_of_memory(run, checkpoint):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run = SimpleNamespace(
        resolved={"training": {"activation_checkpointing": "auto"}},
        arguments=SimpleNamespace(activation_checkpointing=decided),
    )
    monkeypatch.setattr("train.train.train", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        _train_or_explain(run, None)
    assert ("with --activation_checkpointing true" in capsys.readouterr().err) is said


def test_free_memory_is_shared_and_within_the_limit_of_a_container(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 64 kB\nMemAvailable:  4194304 kB\n")
    monkeypatch.setattr(machine, "_SYSTEM", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_CONTAINER", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{2**30 + 1}\n")
    (tmp_path / "memory.stat").write_text(f"file {2**30}\ninactive_file {2**30}\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_of(torch.device("cpu")) == 2
    (tmp_path / "memory.max").write_text(f"{2**30 + 1}\n")
    assert free_of(torch.device("cpu")) == 0.5
    monkeypatch.setattr(machine, "_SYSTEM", tmp_path / "none")
    assert free_of(torch.device("cpu")) is None
