"""`--seeds`: the same run once for each seed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_skip_base.errors import UserError
from llava_skip_base.exits import PREEMPTED
from llava_skip_base.files import read_json, write_json
from tests.support.runs import run
from train.launch import main
from train.resilience.exits import STOP_SIGNALS
from train.seeds import default_output, output_of, take_seeds, train_seeds


@pytest.mark.parametrize(
    ("words", "seeds", "others"),
    [
        (["--data", "x"], None, ["--data", "x"]),
        (["--seeds", "3", "--max-steps", "2"], [42, 43, 44], ["--max_steps", "2"]),
        (["--seeds=1,7"], [1, 7], []),
        (["--seeds", "5,"], [5], []),
    ],
)
def test_seeds_are_a_count_or_a_list(words, seeds, others):
    assert take_seeds(words) == (seeds, others)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "42"], "asks for 42 runs, and at most 20 .* --seed 42"),
        (["--seeds", "0"], "asks for 0 runs"),
        (["--seeds", "a,b"], "expected a number of runs, such as 3, or seeds"),
        (["--seeds", "-1"], "expected a number of runs"),
        (["--seeds", "1,1"], "has 1 more than once"),
        (["--seeds", "4294967296,1"], "expected a number of runs"),
        (["--seeds", "3", "--seed", "1"], "leave out --seed"),
        (["--seeds"], "--seeds needs a value"),
    ],
)
def test_other_seeds_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        take_seeds(words)


def test_the_folder_is_that_of_the_run_or_of_its_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_SKIP_HOME", str(tmp_path))
    recipe = tmp_path / "own.yaml"
    recipe.write_text("preset: llava\noutput_dir: '{checkpoints}/mine'\n")
    assert output_of(["--output-dir", "a"]) == Path("a")
    assert str(output_of(["--recipe", str(recipe)])).endswith("checkpoints/mine")
    assert str(output_of(["--preset", "llava-hd"])).endswith("checkpoints/llava-hd")
    assert str(output_of([])) == default_output(None) and default_output(None).endswith("checkpoints/finetuned")
    write_json(tmp_path / "run.json", {})
    with pytest.raises(UserError, match="holds a run of one seed"):
        output_of(["--output_dir", str(tmp_path)])


def test_each_seed_is_a_run_and_the_first_that_fails_is_the_last(tmp_path, monkeypatch, capsys):
    started, codes = [], {43: 0}

    def call(command):
        started.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        seed = int(command[command.index("--seed") + 1])
        if codes.get(seed, 0) == 0:
            write_json(folder / "train_result.json", {"final_loss": seed / 10, "steps": 4})
        return codes.get(seed, 0)

    monkeypatch.setattr(subprocess, "call", call)
    words = ["--recipe", "embedded", "--output_dir", str(tmp_path / "out")]
    assert train_seeds(words, [42, 43, 44]) == 0
    assert started[1][:5] == [sys.executable, "-m", "llava_skip", "train", "--recipe"]
    assert started[1][-4:] == ["--seed", "43", "--output_dir", str(tmp_path / "out/seed-43")]
    summary = read_json(tmp_path / "out/seeds.json")
    assert [entry["seed"] for entry in summary["runs"]] == [42, 43, 44]
    assert summary["final_loss"] == {"mean": pytest.approx(4.3), "deviation": pytest.approx(0.1)}
    assert "4.3000 ± 0.1000" in capsys.readouterr().out
    started.clear()
    codes[43] = 75
    assert train_seeds(words, [42, 43, 44]) == 75 and len(started) == 2
    codes[42] = -9
    assert train_seeds(words, [42, 43]) == 137


def test_the_launcher_takes_seeds(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("train.launch.train_seeds", lambda words, seeds, _: seen.update(words=words, seeds=seeds) or 3)
    monkeypatch.setattr("train.launch.set_environment", lambda processes: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["launch", "--seeds", "2", "--data", "x"])
    with pytest.raises(SystemExit, match="3"):
        main()
    assert seen == {"words": ["--data", "x"], "seeds": [42, 43]}


def test_no_run_starts_after_a_signal(tmp_path, monkeypatch):
    """It may come as a run ends, which then ends well, or before a run can save anything."""
    started = []
    monkeypatch.setattr(subprocess, "call", lambda command: started.append(command) or 0)
    words = ["--output_dir", str(tmp_path / "out")]
    assert train_seeds(words, [1, 2], lambda: True) == PREEMPTED and len(started) == 1
    assert train_seeds(words, [1], lambda: True) == 0

    def stop(words, seeds, stopped):
        os.kill(os.getpid(), signal.SIGUSR1)
        return 128 + signal.SIGUSR1 if stopped() else 0

    kept = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)}
    monkeypatch.setattr("train.launch.train_seeds", stop)
    monkeypatch.setattr("train.launch.set_environment", lambda processes: None)
    monkeypatch.setattr("sys.argv", ["launch", "--seeds", "2"])
    monkeypatch.setattr("psutil.Process.children", lambda process: [SimpleNamespace(send_signal=lambda number: None)])
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    assert ended.value.code == PREEMPTED


@pytest.mark.slow
def test_two_seeds_are_trained_and_evaluated_and_not_repeated(tmp_path):
    """Real runs: other seeds give other weights; the same command again trains nothing."""
    output = tmp_path / "tiny"
    words = ["train", "--recipe", "embedded", "--seeds", "42,43", "--max_steps", "2", "--output_dir", str(output)]
    first = run(sys.executable, "-m", "llava_skip", *words, NPROC="1")
    assert first.returncode == 0, first.stderr[-2000:]
    weights = [(output / f"seed-{seed}/model.safetensors").read_bytes() for seed in (42, 43)]
    stamps = [(output / f"seed-{seed}/train_result.json").stat().st_mtime_ns for seed in (42, 43)]
    assert weights[0] != weights[1]
    assert [read_json(output / f"seed-{seed}/run.json")["training"]["seed"] for seed in (42, 43)] == [42, 43]
    again = run(sys.executable, "-m", "llava_skip", *words, NPROC="1")
    assert again.returncode == 0, again.stderr[-2000:]
    assert [(output / f"seed-{seed}/train_result.json").stat().st_mtime_ns for seed in (42, 43)] == stamps
    results = tmp_path / "results"
    evaluated = run(
        *(sys.executable, "-m", "llava_skip", "eval", "--model", str(output), "--benchmarks", "pope"),
        *("--limit", "8", "--max-new-tokens", "4", "--output", str(results)),
    )
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    assert sorted(path.name for path in (results / "pope").iterdir()) == ["tiny-seed-42", "tiny-seed-43"]
    (spread,) = json.loads((results / "overview/seeds.json").read_text())
    assert spread["model"] == "tiny" and spread["seeds"] == [42, 43]
