"""What answering cost: measured at each batch, kept over a kill, and the only part of a result that changes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from eval.answering.clock import Clock
from eval.answering.costs import BatchCost, CostLog
from eval.answering.generate import Generator, numerics
from eval.answering.models import check_model
from eval.run import app
from llava_skip_base.machine import peak_memory, restart_peak_memory

COST = BatchCost(4, 2.0, 1.0, 8, 1000, "memory of a kind", "a device", warm=True)
MEASURED = ("costs.jsonl", "run_info.json")


@pytest.fixture
def evaluate(saved: Path, write_tsv: Callable[..., Path], mmstar_rows: list[dict[str, Any]], tmp_path: Path) -> Any:
    data = write_tsv(mmstar_rows)

    def run(output: str, *options: object) -> Path:
        words = ["--model", saved, "--benchmarks", "mmstar", "--data", data, "--output", tmp_path / output]
        limits = ["--batch-size", 2, "--max-new-tokens", 3, *options]
        done = CliRunner().invoke(app, [str(word) for word in [*words, *limits]])
        assert done.exit_code == 0, done.output
        return tmp_path / output / "mmstar" / "random"

    return run


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_a_result_says_what_a_question_cost_and_all_else_is_equal_from_run_to_run(evaluate: Any) -> None:
    one, two = evaluate("one"), evaluate("two")
    costs = result_of(one)["costs"]
    assert (costs["batch_size"], costs["batches"], costs["questions"]) == (2, 2, 3)  # the first of three was cold
    assert costs["prefill_seconds_a_question"] > 0 and costs["decode_seconds_a_question"] > 0
    assert 1 <= costs["new_tokens_a_question"] <= 3 and costs["peak_memory_bytes"] > 10**7
    assert costs["peak_memory"].startswith("peak resident memory of the process") and "CPU" in costs["device"]
    results = [{**result_of(folder), "costs": None} for folder in (one, two)]
    assert results[0] == results[1] and list(results[0])[-1] == "costs"
    names = {path.name for path in one.iterdir()}
    assert {*MEASURED, "answers.jsonl", "run.json", "results.json"} < names
    for name in names - {*MEASURED, "results.json"}:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_an_interrupted_run_keeps_what_was_measured(evaluate: Any) -> None:
    folder = evaluate("out")
    answers, costs = (folder / name for name in ("answers.jsonl", "costs.jsonl"))
    before = costs.read_text()
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:4]))
    costs.write_text(before + before[:20])  # half a line, as after a kill
    evaluate("out")
    assert costs.read_text().startswith(before) and len(costs.read_text().splitlines()) == 4
    costs.unlink()  # as answers of an earlier version
    evaluate("out")
    assert result_of(folder)["costs"] is None and not costs.exists()


def test_summary(tmp_path: Path) -> None:
    log = CostLog(tmp_path, keep=True)
    assert log.summary(4) is None
    cold = replace(COST, prefill_seconds=100.0, warm=False)
    log.append(cold)
    assert log.summary(4)["prefill_seconds_a_question"] == 25.0  # nothing else was measured
    for seconds in (2.0, 4.0, 80.0):
        log.append(replace(COST, prefill_seconds=seconds, peak_memory_bytes=int(seconds)))
    found = CostLog(tmp_path, keep=True).summary(4)
    assert (found["batches"], found["questions"], found["prefill_seconds_a_question"]) == (3, 12, 1.0)
    assert (found["new_tokens_a_question"], found["peak_memory_bytes"]) == (2.0, 80)


@pytest.mark.parametrize("line", ["{", "7", "[]", '{"questions": 1}', '"x"'])
def test_lines_that_are_no_costs_are_left_out(tmp_path: Path, line: str) -> None:
    CostLog(tmp_path, keep=False).append(COST)
    path = tmp_path / "costs.jsonl"
    hostile = json.dumps({**json.loads(path.read_text()), "prefill_seconds": "1"})
    path.write_text(f"{line}\n{path.read_text()}{hostile}\n")
    assert CostLog(tmp_path, keep=True).batches == [COST]


def test_the_clock_is_read_at_the_first_logits() -> None:
    times = iter((1.0, 3.0, 10.0))
    clock, scores = Clock(torch.device("cpu"), lambda: next(times)), torch.ones(2, 3)
    assert all(clock(torch.zeros(2, 1), scores) is scores for _ in range(3))
    assert clock.stop() == (2.0, 7.0)


def test_new_tokens_count_the_end_of_an_answer(saved: Path) -> None:
    generator = Generator(check_model(saved), numerics())
    ends, inner = generator.model.generation_config.eos_token_id, generator.model.generate

    def generate(**inputs: Any) -> torch.Tensor:
        prompt = inner(**inputs)[:, : inputs["input_ids"].shape[1]]
        new = torch.tensor([[5, ends[0], 0], [5, 6, 7]])
        return torch.cat([prompt, new], dim=1)

    generator.model.generate = generate
    generator.answer(["One?", "Two?"], [(), ()], 3)
    assert (generator.cost.questions, generator.cost.new_tokens, generator.cost.warm) == (2, 2 + 3, False)


def test_peak_memory_can_be_counted_anew() -> None:
    large = np.ones(30_000_000)
    before = peak_memory()
    del large
    if not restart_peak_memory():
        pytest.skip("this system counts from the start of the process")
    assert peak_memory() < before - 200_000_000
