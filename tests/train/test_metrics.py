"""What a run measures: windows, MFU, the log file, and a loss that is not finite."""

import json
import shutil
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerControl, TrainerState

from llava_skip_base.exits import TRAINING_ERROR
from playground.data.build import ensure_built
from tests.support.runs import losses, run, train
from tests.support.small_models import SKIP, batch_of, mixed_samples, small_model
from train.arguments import RunArguments
from train.reporting.callbacks import JsonLines, check_reporters
from train.reporting.metrics import Meter, memory_peak, peak_tflops
from train.train import main


def meter_of(model, peak=None, learns=True, ranks=1):
    gather = lambda own: own.expand(ranks, -1)  # noqa: E731
    return Meter(model.config, learns, torch.device("cpu"), peak, gather)


def batch(model):
    inputs = batch_of(mixed_samples(model), "right")
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def test_a_window_counts_over_all_ranks_and_the_next_one_starts_anew():
    model = small_model(SKIP)
    meter, inputs = meter_of(model, ranks=3), batch(small_model(SKIP))
    assert list(meter.timed(iter([1, 2]))) == [1, 2]
    meter.count(inputs | {"truncated": torch.tensor(1)})
    metrics = meter.close_window()
    rows, pictures = int(inputs["attention_mask"].sum()), inputs["pixel_values"].shape[0]
    assert meter.totals["rows"] == 3 * rows and meter.totals["samples"] == 3 * 4 and meter.totals["truncated"] == 3
    assert metrics["skipped_ffn_share"] == pytest.approx(pictures * SKIP.skipped / rows)
    assert metrics["tokens_per_second"] == pytest.approx(3 * rows / meter.totals["seconds"])
    assert metrics["data_wait_seconds"] < metrics["memory_peak_gib"] < 100 and "mfu" not in metrics
    assert meter.close_window()["tokens_per_second"] == 0
    assert meter.so_far()["rows"] == 3 * rows


def test_mfu_counts_the_products_that_torch_counts():
    model = small_model(SKIP).train()
    model.set_attn_implementation("eager")  # torch does not count its fused kernel for CPUs
    inputs = batch_of(mixed_samples(model)[:1], "right")  # without padding, which MFU leaves out
    inputs["labels"] = inputs["input_ids"].clone()
    encoded = {"image": model.get_image_features(inputs["pixel_values"])}
    given = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
    with FlopCounterMode(display=False) as counter:
        model(**given, mm_encoder_outputs=encoded)
    for learns, passes in ((True, 3), (False, 2)):
        meter = meter_of(model, peak=1e-6, learns=learns)  # a million products a second
        list(meter.timed(iter(())))
        meter.count(inputs)
        used = meter.close_window()["mfu"] * meter.totals["seconds"] * 1e6
        assert used == pytest.approx(passes * counter.get_total_flops())


def test_peaks_are_known_given_or_unknown():
    cpu = torch.device("cpu")
    assert peak_tflops(cpu) is None and peak_tflops(cpu, 3.5) == 3.5
    assert 0.01 < memory_peak(cpu) < 1000


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Own", None),
    ],
)
def test_peaks_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda")) == peak


def test_a_continued_run_drops_the_lines_behind_its_checkpoint(tmp_path):
    log, state = JsonLines(), TrainerState(is_world_process_zero=True)
    arguments = RunArguments(output_dir=str(tmp_path), use_cpu=True)
    for state.global_step in (1, 2, 3):
        log.on_log(arguments, state, TrainerControl(), logs={"loss": 1.0})
    with (tmp_path / "train_log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    state.global_step = 2
    log.on_train_begin(arguments, state, TrainerControl())
    log.on_log(arguments, state, TrainerControl(), logs={"loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 2, "loss": 0.5}]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return ensure_built(tmp_path_factory.mktemp("digits") / "digits", train_images=16)


def arguments_for(digits, *more):
    fixed = ("--data", digits / "train.json", "--images", digits / "images", "--tokenizer", digits / "tokenizer")
    return [*map(str, fixed), "--per_device_train_batch_size", "2", "--logging_steps", "1", *more]


def test_wandb_offline_tensorboard_and_json_lines(digits, tmp_path):
    reporters = ("--report_to", "wandb", "tensorboard", "--peak_tflops", "0.1", "--save_steps", "2")
    reporters += ("--save_total_limit", "2")
    rates = ("--learning_rates", '{"vision_tower": 1e-4}', "--learning_rate", "1e-3")
    result = train(
        tmp_path / "run", *arguments_for(digits, *reporters, *rates, "--max_steps", "3"), WANDB_MODE="offline"
    )
    lines = [json.loads(line) for line in (tmp_path / "run/train_log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines[:3]] == losses(result)
    for name in ("tokens_per_second", "samples_per_second", "skipped_ffn_share", "memory_peak_gib", "mfu"):
        assert all(line[name] > 0 for line in lines[:3]), name
    assert all(0 <= line["data_wait_seconds"] < 100 for line in lines[:3])
    for line in lines[:3]:
        assert line["learning_rate/language_model"] == line["learning_rate"]
        assert line["learning_rate/vision_tower"] == pytest.approx(line["learning_rate"] / 10)
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert list((tmp_path / "run/tensorboard").glob("events.out.*"))
    record = json.loads((tmp_path / "run/checkpoint-2/run.json").read_text())
    assert record == json.loads((tmp_path / "run/run.json").read_text())
    assert result["samples"] == 6


def test_a_continued_run_goes_on_counting(digits, tmp_path):
    command = arguments_for(digits, "--max_steps", "4", "--save_steps", "2", "--save_total_limit", "2")
    whole = train(tmp_path / "run", *command)
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    (tmp_path / "run/train_result.json").unlink()
    continued = train(tmp_path / "run", *command)
    for name in ("rows", "squared_rows", "ffn_rows", "supervised", "samples"):
        assert continued[name] == whole[name] > 0
    assert losses(continued) == losses(whole)
    lines = [json.loads(line) for line in (tmp_path / "run/train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_records(digits, tmp_path):
    command = arguments_for(digits, "--learning_rate", "1e30", "--max_grad_norm", "0", "--max_steps", "20")
    place = ("--use_cpu", "true", "--output_dir", str(tmp_path / "run"))
    ended = run(sys.executable, "-m", "train.train", *command, *place)
    assert ended.returncode == TRAINING_ERROR, ended.stderr
    found = json.loads((tmp_path / "run/nonfinite_loss.rank0.json").read_text())
    known = {record["id"] for record in json.loads((digits / "train.json").read_text())}
    assert len(found["record_ids"]) == 2
    assert all(any(f"(id {name!r})" in record for name in known) for record in found["record_ids"])
    assert found["loss"] in ("nan", "inf", "-inf") and found["step"] < 20
    assert "error: the loss of step" in ended.stderr and "nonfinite_loss.rank0.json" in ended.stderr
    assert not (tmp_path / "run/model.safetensors").exists()


def test_wandb_without_an_account_is_refused_at_once(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("wandb.login", lambda prompt: False)
    with pytest.raises(ValueError, match="WANDB_MODE=offline"):
        check_reporters(RunArguments(output_dir=str(tmp_path), use_cpu=True, report_to="wandb"))


def test_a_dry_run_says_what_would_learn_and_leaves_nothing(digits, tmp_path, monkeypatch, capsys):
    command = arguments_for(digits, "--train_parts", "summary", "--dry_run", "true", "--learning_rate", "3e-4")
    monkeypatch.setattr("sys.argv", ["train", *command, "--use_cpu", "true", "--output_dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="0"):
        main()
    shown = capsys.readouterr().out
    assert "385 of 385 parameters learn, learning rate 0.0003" in shown
    record = json.loads(shown[shown.index("\n{") :])
    assert record["model"]["train_parts"] == ["summary"] and not (tmp_path / "run").exists()
