"""Plans: what is printed, what fits, and each of a user's mistakes as one message."""

import json
import re
import sys

import pytest

from llava_skip import preset_config
from llava_skip.flops import decoder_flops
from llava_skip.gpus import GPUS, get_gpu, gpu_of_device
from llava_skip.memory import Zero
from llava_skip.presets import PRESETS
from llava_skip.step_flops import step_flops
from playground.data.build import ensure_built
from train.plan import main, make_plan, read_arguments, shape_of, within, zero_of
from train.planning.estimate import Machine, Training, parameter_counts, training_cost
from train.planning.models import config_for, size_of
from train.planning.shape import assumed

LLAMA = ("--size", "llama3-8b", "--samples", "665298")


def plan(*words):
    arguments = read_arguments(words)
    return make_plan(arguments, shape_of(arguments))


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["llava-skip plan", *words])
    code = 0
    try:
        main()
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr()


def test_a_run_is_planned_for_two_presets_and_leaves_numbers_and_a_picture(monkeypatch, capsys, tmp_path):
    files = ("--json", str(tmp_path / "plan.json"), "--picture", str(tmp_path / "plan.png"))
    code, shown = run(monkeypatch, capsys, *LLAMA, "--preset", "llava", "sv-llava-100", *files)
    assert code == 0 and "these fit: llava, sv-llava-100." in shown.out
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((tmp_path / "plan.json").read_text())
    dense, skipping = (one["training"] for one in found["variants"])
    assert dense["steps"] == skipping["steps"] == 5198
    assert 0.4 < skipping["hours"] / dense["hours"] < 0.5
    assert f"{dense['hours']:.1f}" in shown.out and "assumed: 200 tokens of text" in shown.out


def test_hours_are_the_products_at_the_share_of_the_peak():
    config, shape = preset_config("sv-llava-100", "llama3-8b"), assumed(1000, 100, 50, 1.0)
    training = Training(("language_model",), 4, 40, checkpointing=True)
    machine = Machine("own", GPUS["H100"], 4, 0.5, step_seconds=2.0)
    cost = training_cost(config, shape, training, machine)
    load = shape.load(config, 2048)
    assert (load.tokens, load.ffn_tokens, load.head_tokens) == (358_000, 202_000, 50_000)
    flops = step_flops(config, load, ("language_model",), True, updated=cost["trainable"] * 25)
    assert cost["flops"] == pytest.approx(flops.total)
    assert cost["hours"] * 3600 == pytest.approx(flops.total / (4 * 989e12 * 0.5) + 25 * 2.0)
    assert cost["steps"] == 25 and cost["mfu"] < 0.5


def test_a_row_of_samples_has_no_mask_and_needs_the_memory_of_its_tokens():
    words = (*LLAMA, "--preset", "llava", "--activation_checkpointing", "false", "--per_device_train_batch_size")
    two = plan(*words, "2")["variants"][0]["training"]
    row = plan(*words, "1", "--max_tokens_per_batch", "4096")["variants"][0]["training"]
    longer = plan(*words, "1", "--max_tokens_per_batch", "8192")["variants"][0]["training"]
    assert row["hours"] == two["hours"] and row["steps"] == two["steps"]
    saved = [one["memory"]["activations"] for one in (two, row, longer)]
    assert 0.9 * saved[0] < saved[1] < saved[0]  # neither a mask nor, in a dense model, gathered tokens of the FFN
    assert saved[2] == pytest.approx(2 * saved[1], rel=0.1)  # not all of the logits exist at once
    usual = row["memory"]["mean_batch_activations"]  # a row is full, whatever its samples are
    assert usual == pytest.approx(saved[1], rel=0.2)


def test_a_sample_of_a_dense_model_costs_what_the_decoder_formula_says():
    config = preset_config("llava", "llama3-8b")
    load = assumed(1, 100, 50, 1.0).load(config, 2048)
    found = step_flops(config, load)
    expected = decoder_flops(config.text_config, 676, 676, 50, last_ffn_tokens=50)
    assert found.decoder + found.head == pytest.approx(expected.total)


def test_text_beyond_the_limit_is_cut_and_a_cut_image_does_not_fit():
    config, shape = preset_config("llava", "llama3-8b"), assumed(10, 1000, 500, 1.0)
    assert shape.load(config, 676).tokens == 6760 and shape.load(config, 676).head_tokens == 500
    (one,) = plan(*LLAMA, "--preset", "llava-hd")["variants"]
    assert one["training"]["image_is_cut"] and not one["training"]["memory"]["fits"]
    (one,) = plan(*LLAMA, "--preset", "llava-hd", "--max_length", "3500")["variants"]
    assert not one["training"]["image_is_cut"]


def test_data_that_is_here_is_measured(tmp_path):
    digits = ensure_built(tmp_path / "digits", train_images=4)
    arguments = read_arguments(
        ["--size", "tiny", "--data", str(digits / "train.json"), "--images", str(digits / "images"),
         "--tokenizer", str(digits / "tokenizer"), "--template", "v1", "--preset", "llava"]
    )  # fmt: skip
    shape = shape_of(arguments)
    records = json.loads((digits / "train.json").read_text())
    assert shape.samples == len(records) and shape.source.startswith("measured: ")
    with_image = sum("image" in record for record in records)
    assert (shape.weights * shape.images).sum() == pytest.approx(with_image)
    assert (shape.supervised < shape.text).all() and (shape.supervised > 0).all()
    arguments.most_records = 3
    assert shape_of(arguments).samples == pytest.approx(len(records)) and len(shape_of(arguments).text) == 3


def test_numbers_come_from_a_recipe_and_flags_override_it():
    arguments = read_arguments(["--recipe", "table1-sv-llava-100", "--gpus", "4"])
    training = arguments.training
    assert (training.samples_per_step, training.batch, training.zero) == (64, 8, Zero(3))
    shape = shape_of(arguments)
    assert round(shape.samples) == 665_298 and shape.images.max() == 1
    assert shape_of(read_arguments(["--recipe", "table1-llava", "--text_tokens", "300"])).text.max() == 300
    (one,) = make_plan(arguments, shape)["variants"]
    assert one["name"] == "sv-llava-100" and one["inference"]["tokens"] == 258
    (one,) = plan("--recipe", "table2-visionzip")["variants"]
    assert one["name"] == "visionzip:64" and one["inference"]["tokens"] == 64
    lora = read_arguments(["--recipe", "lora"]).training
    assert (lora.lora_rank, lora.zero) == (128, Zero(2))


def test_the_size_of_a_model_follows_from_the_recipe_that_makes_it():
    assert size_of("{checkpoints}/table1-sv-cos", None) == "llama3-8b"
    assert size_of("{checkpoints}/table2-llava", None) == size_of("lmsys/vicuna-7b-v1.5", None) == "vicuna-7b"
    assert size_of("own/model", "tiny") == "tiny" and size_of("own/model", None) is None
    with pytest.raises(ValueError, match=r"What own/model costs is not known: .* Give --size"):
        config_for("own/model", None, "llava", None)
    with pytest.raises(ValueError, match="--size is 'large'; known: tiny, vicuna-7b, llama3-8b"):
        config_for(None, "large", "llava", None)


def test_parameters_are_those_of_the_model():
    counts = parameter_counts(preset_config("llava", "llama3-8b"), ("language_model",), 0)
    assert counts["trainable"] == counts["language_model"] == pytest.approx(8.03e9, rel=1e-3)
    with_factors = parameter_counts(preset_config("llava", "llama3-8b"), ("language_model",), 16)
    assert with_factors["trainable"] == 41_943_040  # what PEFT has for rank 16 on all linear layers of LLaMA3-8B
    assert with_factors["all"] == counts["all"] + with_factors["trainable"]


def test_help_lists_arguments_alone(monkeypatch, capsys):
    code, shown = run(monkeypatch, capsys, "--help")
    assert code == 0 and "--budget_ms" in shown.out and "--dense" not in shown.out


def test_a_part_of_an_epoch_has_a_step_at_least():
    """As the trainer rounds; it was a division by 0."""
    (one,) = plan("--size", "tiny", "--preset", "llava", "--samples", "10", "--num_train_epochs", "0.01")["variants"]
    assert one["training"]["steps"] == 1 and Training((), 4, 4, epochs=0.3).steps(20) == 2


def test_zero_is_read_from_its_file(tmp_path):
    assert zero_of(None) == zero_of("") == Zero()
    assert zero_of("zero3_offload") == Zero(3, True, True) and zero_of("zero2_offload") == Zero(2, True)
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert zero_of(str(tmp_path / "own.json")) == Zero(1)


def test_gpus_by_name():
    assert get_gpu("h100-pcie") == GPUS["H100 PCIe"] and gpu_of_device("NVIDIA A100-SXM4-80GB") == GPUS["A100"]
    assert read_arguments(["--gpu", "A100", "--gpu_memory", "40"]).machine.gpu.memory == 40
    own = read_arguments(["--gpu", "own", "--gpu_memory", "64", "--gpu_tflops", "500"]).machine.gpu
    assert (own.memory, own.tflops) == (64, 500)


def test_budgets_choose_among_all_presets():
    found = plan("--size", "llama3-8b", "--budget_ms", "45")
    assert {one["name"] for one in found["variants"]} == set(PRESETS)
    assert within(found) == ["sv-llava-64", "sv-llava-100", "cos-80"]
    assert "training" not in found["variants"][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpu", "A1000"), "Unknown GPU 'A1000'; known: B200, "),
        (("--gpus", "0"), "--gpus is 0; it must be above 0."),
        (("--utilisation", "1.2"), "--utilisation is 1.2; it must be above 0, and at most 1."),
        ((*LLAMA, "--preset", "sv-cos", "--budget_hours", "1"), "Nothing fits 1 hours: the nearest, sv-cos, takes 7."),
        (("--size", "llama3-8b", "--preset", "llava", "--budget_ms", "5"), "Nothing fits 5 ms: the nearest, llava, "),
        (("--budget_hours", "5"), "--budget_hours needs data: give --data or --samples."),
        ((*LLAMA, "--preset", "llava", "--gpu", "RTX 4090"), "Nothing fits the memory of a GPU: the nearest, llava, "),
        (("--data", "nowhere.json"), "--data nowhere.json is not here to be measured, and none of "),
        (("--samples", "-3"), "--samples is -3; it must be from 1 to "),
        (("--samples", "5", "--image_share", "2"), "--image_share is 2; it must be from 0 to 1."),
        (("--size", "tiny", "--preset", "sv-lava"), "Unknown preset 'sv-lava'"),
        (("--size", "llama3-8b", "--reduction", "visionzip:9999"), "keeps 9999 tokens"),
        (
            ("--size", "llama3-8b", "--data", "."),
            "--data is measured with the model's tokenizer, which a --size has not",
        ),
        ((*LLAMA, "--max_tokens_per_batch", "1000"), "is 1000, and a sample may have 2048 tokens: raise it"),
        (("--seeds", "3"), "--seeds is for llava-skip train"),
        (("--size", "tiny", "--step_seconds", "nan"), "--step_seconds is nan; it must be 0 or above."),
        (("--size", "tiny", "--answer_tokens=-5"), "--answer_tokens is -5; it must be above 0."),
        ((*LLAMA, "--preset", "llava", "--deepspeed", "zero9"), "--deepspeed is 'zero9'; expected one of zero2, "),
        ((*LLAMA, "--preset", "llava", "--max_length", "10"), "No image fits --max_length"),
        (("--size", "llama3-8b", "--preset", "llava", "--gpu_memory", "9"), "No weights of 16 bits with one request"),
    ],
)
def test_a_mistake_is_one_message(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    code, shown = run(monkeypatch, capsys, *words)
    assert code == 2 and re.search(re.escape(message), shown.err) and "Traceback" not in shown.err
