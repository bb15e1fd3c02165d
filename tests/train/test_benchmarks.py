"""Benchmarks while training: the project's own program evaluates each checkpoint, and training does not notice."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava_skip_base.files import write_json
from tests.support.interrupted import write_inputs
from tests.support.runs import losses, train_many
from train.benchmarks import Benchmarks, benchmark_scores, check_benchmarks
from train.reporting.result import show_result
from train.run import parse

OUT = ("--output_dir", "y", "--data", "x", "--use_cpu", "true")


def parsed(*words: str):
    model, _, run = parse([*OUT, *words])
    return model, run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--eval_benchmarks_limit 3", "need --eval_benchmarks, such as mmstar"),
        ("--eval_benchmarks_data mmstar=x.tsv", "need --eval_benchmarks, such as mmstar"),
        ("--eval_benchmarks mmstar --lora_enable true", "a checkpoint is an adapter"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        check_benchmarks(*parsed(*words.split()))


def test_a_number_of_questions_must_be_above_zero():
    with pytest.raises(ValueError, match="eval_benchmarks_limit is 0"):
        parsed("--eval_benchmarks", "mmstar", "--eval_benchmarks_limit", "0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval_benchmarks", "mmsta"], "--eval_benchmarks mmsta: .*mmstar"),
        (["--eval_benchmarks", "mmstar", "--eval_benchmarks_data", "mmstar=nowhere.tsv"], "nowhere.tsv"),
    ],
)
def test_the_evaluation_itself_checks_its_benchmarks(words, message):
    with pytest.raises(ValueError, match=message):
        check_benchmarks(*parsed(*words))


@pytest.fixture
def callback(tmp_path):
    """The callback of the first process, whose evaluation is a stand-in, and what it logged."""
    run = SimpleNamespace(
        output_dir=str(tmp_path), process_index=0, eval_benchmarks="mmstar, pope", eval_benchmarks_data=None,
        eval_benchmarks_limit=None,
    )  # fmt: skip
    logged: list[dict] = []
    callback = Benchmarks(run, logged.append, lambda place: None, SimpleNamespace(is_asked=False))
    return callback, logged, tmp_path


def evaluation(monkeypatch, code: str) -> None:
    """A Python text in place of the evaluation."""
    monkeypatch.setattr("train.benchmarks.command", lambda run, *more: [sys.executable, "-c", code, *more])


WRITE = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1]) / "mmstar" / "checkpoint-2"
folder.mkdir(parents=True)
(folder / "results.json").write_text(json.dumps({"score": 12.5}))
print("no room")
sys.exit(7)
"""


def test_a_benchmark_that_fails_is_counted_and_training_goes_on(callback, monkeypatch, capsys):
    own, logged, folder = callback
    evaluation(monkeypatch, WRITE)
    own.on_save(None, SimpleNamespace(global_step=2), None)
    assert logged == [{"eval_mmstar": 12.5}]
    assert benchmark_scores(folder) == [{"step": 2, "scores": {"mmstar": 12.5, "pope": None}}]
    assert "the benchmarks of step 2 ended with code 7" in (said := capsys.readouterr().err) and "no room" in said
    own.on_save(None, SimpleNamespace(global_step=2), None)  # it is done
    assert len(logged) == 1


def test_an_evaluation_that_is_asked_to_leave_is_continued_by_the_next_start(callback, monkeypatch):
    own, logged, folder = callback
    evaluation(monkeypatch, "import time; time.sleep(60)")
    own._preemption.is_asked = True
    own.on_save(None, SimpleNamespace(global_step=2), None)
    assert json.loads((folder / "benchmarks/checkpoint-2.json").read_text())["interrupted"] is True
    own._preemption.is_asked = False
    evaluation(monkeypatch, WRITE)
    own.on_train_begin(None, SimpleNamespace(global_step=2), None)
    assert logged[-1] == {"eval_mmstar": 12.5}
    own.on_train_begin(None, SimpleNamespace(global_step=2), None)
    assert len(logged) == 2


def test_the_closing_table_has_the_scores(tmp_path, capsys):
    result = dict.fromkeys(
        ("steps", "final_loss", "tokens_per_second", "samples_per_second", "skipped_ffn_share", "truncated", "seconds"),
        1.0,
    )
    for step, score in ((2, 30.0), (4, None), (6, 25.0)):
        write_json(tmp_path / f"benchmarks/checkpoint-{step}.json", {"step": step, "scores": {"mmstar": score}})
    show_result(result | {"preset": "llava", "benchmarks": benchmark_scores(tmp_path)}, tmp_path)
    shown = " ".join(capsys.readouterr().out.split())
    assert "25.0 at step 6, best 30.0 at step 2, failed at 1 checkpoints" in shown


@pytest.mark.slow
def test_each_checkpoint_of_two_processes_is_evaluated(tmp_path):
    torch.manual_seed(0)
    inputs = write_inputs(tmp_path / "inputs")
    digits = Path(__file__).parents[2] / "playground/data/digits/eval"
    ask = ["--eval_benchmarks", "mmstar", "--eval_benchmarks_data", f"mmstar={digits / 'mmstar.tsv'}"]
    every = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--deepspeed", "zero2"]
    runs = {
        tmp_path / "plain": [*inputs, *every],
        tmp_path / "run": [*inputs, *every, *ask, "--eval_benchmarks_limit", "4"],
    }
    plain, result = train_many(runs, 2)
    assert losses(result) == losses(plain) and plain["benchmarks"] == []
    assert [entry["step"] for entry in result["benchmarks"]] == [2, 4]
    for entry in result["benchmarks"]:
        own = json.loads((tmp_path / f"run/benchmarks/mmstar/checkpoint-{entry['step']}/results.json").read_text())
        assert entry["scores"] == {"mmstar": own["score"]}
    lines = [json.loads(line) for line in (tmp_path / "run/train_log.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "eval_mmstar" in line]) == 2
