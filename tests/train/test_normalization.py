"""What the loss is a mean over, with real processes: two against one, with and without accumulation."""

import json

import pytest

from playground.data.build import ensure_built
from tests.support.runs import losses, train, train_many

STEPS = 5


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    digits = ensure_built(tmp_path_factory.mktemp("digits") / "digits", train_images=64)
    return [
        "--data", str(digits / "train.json"), "--images", str(digits / "images"),
        "--tokenizer", str(digits / "tokenizer"), "--max_steps", str(STEPS), "--logging_steps", "1",
        "--learning_rate", "8e-4", "--save_strategy", "no", "--disable_tqdm", "true",
    ]  # fmt: skip


def shape(batch, accumulation, normalization):
    names = ("--per_device_train_batch_size", "--gradient_accumulation_steps", "--loss_normalization")
    values = (batch, accumulation, normalization)
    return [str(word) for pair in zip(names, values, strict=True) for word in pair]


@pytest.fixture(scope="module")
def two(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    runs = {folder / "step": shape(2, 2, "step"), folder / "micro": shape(2, 2, "micro_batch")}
    results = train_many({output: arguments + own for output, own in runs.items()}, processes=2)
    return dict(zip(("step", "micro_batch"), map(losses, results), strict=True))


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")

    def run(*own):
        return losses(train(folder / "-".join(map(str, own)), *arguments, *shape(*own)))

    return run


@pytest.mark.parametrize(
    ("batch", "accumulation", "normalization"), [(8, 1, "step"), (2, 4, "step"), (2, 4, "micro_batch")]
)
def test_two_processes_have_the_losses_of_one(two, alone, batch, accumulation, normalization):
    assert two[normalization] == pytest.approx(alone(batch, accumulation, normalization), abs=2e-5)


def test_the_two_normalizations_differ(two):
    # They weigh micro batches differently.
    assert max(abs(a - b) for a, b in zip(two["step"], two["micro_batch"], strict=True)) > 1e-3


def test_a_step_without_supervised_tokens_has_the_loss_zero(arguments, tmp_path):
    turns = [{"from": "human", "value": "digit " * 40}, {"from": "gpt", "value": "two"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "long", "conversations": turns}]))
    data = ["--data", str(tmp_path / "data.json"), "--max_length", "20"]
    result = train(tmp_path / "run", *arguments, *data, *shape(1, 1, "step"))
    assert losses(result) == [0.0] * STEPS and result["truncated"] == STEPS
