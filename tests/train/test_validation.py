"""Validation while training: its loss is right however it is divided, and training does not notice it."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llava_skip import LlavaSkipForConditionalGeneration
from llava_skip.vision.values import PixelValues
from llava_skip_base.exits import PREEMPTED
from tests.support.interrupted import launch_and_wait, outcome, write_inputs
from tests.support.runs import ROOT, losses, train
from train.arguments import identity, resolved
from train.data import load_records
from train.run import check, parse
from train.validation import rounds, split

SHARE = ("--eval_share", "0.3", "--eval_strategy", "steps")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads add up in an order of their own, run by run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    torch.manual_seed(0)
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def validated(arguments, tmp_path_factory):
    output = tmp_path_factory.mktemp("validated") / "run"
    return output, train(output, *arguments, *SHARE, "--logging_steps", "1")


def by_hand(model_folder, given):
    """The mean loss of the supervised tokens of the validation set, one sample at a time."""
    run = check(*parse([*given, "--output_dir", "nowhere"]))
    model = LlavaSkipForConditionalGeneration.from_pretrained(model_folder).eval()
    values = PixelValues.of(run.processor)
    total, tokens = 0.0, 0
    for index in range(len(run.validation)):
        sample = run.validation[index]
        ids, labels = (torch.tensor([sample[name]]) for name in ("input_ids", "labels"))
        pixels = {}
        if "pixel_values" in sample:
            pixels = {"pixel_values": values(torch.as_tensor(np.array(sample["pixel_values"])))}
        with torch.no_grad():
            logits = model(input_ids=ids, **pixels).logits[0, :-1]
        kept = labels[0, 1:] != -100
        total += torch.nn.functional.cross_entropy(logits[kept], labels[0, 1:][kept], reduction="sum").item()
        tokens += int(kept.sum())
    return total / tokens, tokens, len(run.validation)


def test_the_loss_is_the_mean_over_all_tokens(arguments, validated):
    output, result = validated
    loss, tokens, samples = by_hand(output, [*arguments, *SHARE])
    last = result["validation"][-1]
    assert last["step"] == 13 and (last["eval_tokens"], last["eval_samples"]) == (tokens, samples) and samples == 7
    assert last["eval_loss"] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("more", [("1",), ("3",), ("64",), ("4", "--padding_free", "true"), ("4", "--bf16", "false")])
def test_the_batch_size_changes_nothing(arguments, validated, tmp_path, more):
    given = [*arguments, *SHARE, "--per_device_eval_batch_size", *more, "--max_steps", "3"]
    first = train(tmp_path / "run", *given, "--lr_scheduler_type", "constant")["validation"][0]
    loss, tokens, _ = by_hand(tmp_path / "run", given)
    assert first["eval_loss"] == pytest.approx(loss, abs=1e-6) and first["eval_tokens"] == tokens


def test_training_does_not_notice_it(arguments, validated, tmp_path):
    often = ("--eval_steps", "2", "--dataloader_num_workers", "1", "--logging_steps", "1")
    rare = train(tmp_path / "rare", *arguments, *SHARE, "--eval_steps", "13", "--logging_steps", "1")
    for result in (validated[1], train(tmp_path / "often", *arguments, *SHARE, *often)):
        assert losses(result) == losses(rare) and len(result["validation"]) > len(rare["validation"]) == 1
        norms = [[entry["grad_norm"] for entry in one["history"]] for one in (result, rare)]
        assert norms[0] == norms[1]
        for name in ("samples", "rows", "supervised", "truncated"):
            assert result[name] == rare[name]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("rare", "often"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_other_data_is_any_source(arguments, validated, tmp_path):
    """The same losses as without validation at all; images from the training folder, or one of their own."""
    plain = train(tmp_path / "plain", *arguments, "--logging_steps", "1")
    data = arguments[arguments.index("--data") + 1]
    lines = tmp_path / "eval.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in json.loads(open(data).read())[:5]))
    given = [*arguments, "--eval_data", str(lines), "--eval_strategy", "epoch"]
    result = train(tmp_path / "run", *given, "--logging_steps", "1")
    assert losses(result) == losses(plain) and plain["validation"] == []
    assert [entry["step"] for entry in result["validation"]] == [6, 12, 13]  # two epochs, and the end of the run
    assert result["validation"][0]["eval_samples"] == 5
    assert by_hand(tmp_path / "run", given)[0] == pytest.approx(result["validation"][-1]["eval_loss"], abs=1e-6)


def test_what_a_run_leaves_names_it(validated, capsys):
    from train.reporting.result import show_result

    output, result = validated
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    assert [line["eval_loss"] for line in lines if "eval_loss" in line] == [
        e["eval_loss"] for e in result["validation"]
    ]
    show_result(result, output)
    shown = capsys.readouterr().out
    assert re.search(r"validation loss +\W +\d\.\d{4}, lowest \d\.\d{4} at step \d+", shown), shown
    assert "7, of which 0 cut to max_length" in shown and "the last step" in shown
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_share_is_disjoint_and_follows_the_seed(arguments):
    images = arguments[arguments.index("--images") + 1]
    records = load_records(arguments[arguments.index("--data") + 1], images)
    kept, held = split(records, 0.3, 5)
    assert sorted([*kept.used_rows, *held.used_rows]) == list(range(22)) and len(held) == 7
    assert np.array_equal(held.rows, split(records, 0.3, 5)[1].rows)
    assert not np.array_equal(held.rows, split(records, 0.3, 6)[1].rows)
    twice = load_records(arguments[arguments.index("--data") + 1], images)
    twice.rows = np.tile(np.arange(22), 2)  # a record that is read twice an epoch is held out as a whole
    kept, held = split(twice, 0.3, 5)
    assert not set(kept.rows) & set(held.rows) and (len(kept), len(held)) == (30, 7)
    for share in (0.01, 0.99):
        with pytest.raises(ValueError, match=f"--eval_share {share} of 22 records is"):
            split(records, share, 0)


@pytest.mark.parametrize(("size", "processes"), [(1, 1), (2, 3), (4, 2), (100, 8)])
def test_rounds_have_each_sample_once_and_one_kind(size, processes):
    kinds = [bool(index % 3) for index in range(17)]
    found = list(rounds(kinds, size, processes))
    assert all(len(batches) == processes and max(map(len, batches)) <= size and batches[0] for batches in found)
    assert sorted(index for batches in found for batch in batches for index in batch) == list(range(17))
    assert all(len({kinds[index] for batch in batches for index in batch}) == 1 for batches in found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--eval_strategy steps", "--eval_strategy needs --eval_data, or --eval_share 0.01."),
        ("--eval_share 0.1", "--eval_share needs --eval_strategy steps or epoch"),
        ("--eval_share 0.1 --eval_data x --eval_strategy epoch", "are both given"),
        ("--eval_share 1 --eval_strategy epoch", "--eval_share is 1.0; it must be above 0 and below 1."),
        ("--eval_share 0.1 --eval_strategy epoch --streaming true --max_steps 3", "--eval_share needs a set"),
        ("--eval_share 0.1 --eval_images x --eval_strategy epoch", "--eval_images needs --eval_data"),
        ("--eval_data nowhere.json --eval_strategy epoch", "nowhere.json does not exist"),
        ("--eval_share 0.3 --eval_strategy epoch --load_best_model_at_end true", "save and eval strategy to match"),
        (
            "--eval_share 0.3 --eval_strategy steps --eval_steps 2 --save_steps 4 --load_best_model_at_end true",
            "leave out --eval_steps, which is then --save_steps (4)",
        ),
        ("--metric_for_best_model accuracy", "--metric_for_best_model accuracy is not taken. Use loss"),
    ],
)
def test_mistakes_show_before_a_model_loads(arguments, tmp_path, words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(*parse([*arguments, *words.split(), "--output_dir", str(tmp_path / "run")]))


def test_faulty_validation_records_are_refused_or_counted(arguments, tmp_path):
    records = json.loads(open(arguments[arguments.index("--data") + 1]).read())[:4]
    records[1]["conversations"][1]["from"] = "nobody"
    (tmp_path / "eval.json").write_text(json.dumps(records))
    given = [*arguments, "--eval_data", str(tmp_path / "eval.json"), "--eval_strategy", "epoch", "--max_steps", "1"]
    with pytest.raises(ValueError, match="1 of 4 records are faulty"):
        check(*parse([*given, "--output_dir", str(tmp_path / "run")]))
    result = train(tmp_path / "run", *given, "--drop_faulty", "true", "--save_strategy", "no")
    assert (result["dropped"], result["dropped_validation"]) == (0, 1)
    assert result["validation"][0]["eval_samples"] == 3


@pytest.mark.parametrize("words", ["", "--eval_share 0.3 --eval_strategy steps"])
def test_when_to_save_and_to_validate_makes_no_other_run(words):
    given = [*words.split(), "--data", "x", "--output_dir", "y", "--use_cpu", "true", "--save_steps"]
    one, two = parse([*given, "3"]), parse([*given, "4"])
    assert identity(resolved(*one)) == identity(resolved(*two))
    assert (one[2].eval_steps, two[2].eval_steps) == ((3, 4) if words else (None, None))


BEST = (*SHARE, "--load_best_model_at_end", "true", "--save_steps", "2", "--max_steps", "10")
# A rate that grows, at which the loss only rises: the first checkpoint is the best.
WORSE = ("--learning_rate", "10", "--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "20")


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_exported(attempt, arguments, tmp_path):
    output = tmp_path / "whole"
    given = [*arguments, *BEST, *WORSE, "--output_dir", str(output)]
    assert attempt(given)["code"] == 0
    result = json.loads((output / "train_result.json").read_text())
    points = [(entry["eval_loss"], entry["step"]) for entry in result["validation"]]
    best = f"checkpoint-{min(points)[1]}"
    assert [step for _, step in points] == [2, 4, 6, 8, 10] and best != "checkpoint-10" and result["exported"] == best
    assert sorted(path.name for path in output.glob("checkpoint-*")) == sorted([best, "checkpoint-10"])
    assert (output / "model.safetensors").read_bytes() == (output / best / "model.safetensors").read_bytes()
    broken = tmp_path / "broken"
    given[-1] = str(broken)
    for place in (("training_step", 9), ("measure", 1), ("export", 1)):  # after step 8; in a validation; at the end
        assert attempt(given, *place)["code"] == -signal.SIGKILL
    end = attempt(given)
    assert end["code"] == 0, end["output"]
    again = json.loads((broken / "train_result.json").read_text())
    assert again["exported"] == best and without_times(again["validation"]) == without_times(result["validation"])
    assert (broken / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()


def without_times(entries):
    return [{name: value for name, value in entry.items() if name != "eval_seconds"} for entry in entries]


@pytest.mark.parametrize("strategy", ["steps", pytest.param("epoch", marks=pytest.mark.slow)])
def test_an_interrupted_run_has_the_validations_of_a_whole_one(attempt, arguments, tmp_path, strategy):
    given = [*arguments, *SHARE, "--eval_strategy", strategy, "--save_steps", "4", "--eval_steps", "4"]
    whole, broken = ([*given, "--output_dir", str(tmp_path / name)] for name in ("whole", "broken"))
    assert attempt(whole)["code"] == 0
    assert attempt(broken, "measure", 2)["code"] == -signal.SIGKILL
    assert attempt(broken, "training_step", 4, "SIGTERM")["code"] == PREEMPTED  # at the last step of an epoch, too
    assert attempt(broken, "finish_checkpoint", 1)["code"] == -signal.SIGKILL
    end = attempt(broken)
    assert end["code"] == 0, end["output"]
    one, two = (outcome(tmp_path / name) for name in ("whole", "broken"))
    assert one["logged"] == two["logged"] and one["history"] == two["history"]
    first, second = (json.loads((tmp_path / n / "train_result.json").read_text()) for n in ("whole", "broken"))
    assert without_times(first["validation"]) == without_times(second["validation"])
    assert [entry["step"] for entry in first["validation"]] == (
        [4, 8, 12, 13] if strategy == "steps" else [4, 8, 12, 13]
    )


@pytest.mark.slow
def test_lora_exports_its_best_adapter(arguments, tmp_path):
    given = [*arguments, *BEST, *WORSE, "--lora_enable", "true", "--lora_r", "4"]
    result = train(tmp_path / "run", *given)
    best = tmp_path / "run" / result["exported"]
    assert result["exported"] != "the last step"
    name = "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (best / name).read_bytes()
    shutil.rmtree(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("zero", [None, "zero2", "zero3"])
def test_two_processes_have_the_loss_of_one(arguments, validated, tmp_path, zero):
    settings = json.loads((ROOT / f"scripts/{zero or 'zero2'}.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    more = ["--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "3", "--learning_rate", "1e-12"]
    more += ["--output_dir", str(tmp_path / "run")]
    more += ["--deepspeed", str(tmp_path / "zero.json")] if zero else []
    # Dropout differs between one process and two: a rate of nearly nothing keeps the weights.
    end = launch_and_wait(
        [*arguments, *SHARE, *more, "--learning_rate", "1e-12", "--output_dir", str(tmp_path / "run")]
    )
    assert end["code"] == 0, end["output"]
    result = json.loads((tmp_path / "run/train_result.json").read_text())
    loss, tokens, samples = by_hand(tmp_path / "run", [*arguments, *SHARE])
    for entry in result["validation"]:
        assert (entry["eval_tokens"], entry["eval_samples"]) == (tokens, samples)
        assert entry["eval_loss"] == pytest.approx(loss, abs=1e-6)
