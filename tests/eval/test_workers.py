import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KILLS, QUESTIONS = 8 * int(os.environ.get("KILL_ROUNDS", "1")), 240


@pytest.fixture
def questions(write_tsv: Callable[..., Path], encoded_image: Callable[..., str]) -> Path:
    rows = [
        {
            "index": number,
            "question": f"Question {number}{'?' * (number % 7)}",
            "image": encoded_image((number, 2 * number, 0)),
            "answer": "ABCD"[number % 4],
            "category": "math",
            "l2_category": "geometry",
        }
        for number in range(QUESTIONS)
    ]
    return write_tsv(rows)


@pytest.fixture
def start(saved: Path, questions: Path, tmp_path: Path) -> Callable[..., subprocess.Popen]:
    def run(output: str, processes: int) -> subprocess.Popen:
        words = ["--model", saved, "--benchmarks", "mmstar", "--data", questions, "--output", tmp_path / output]
        limits = ["--processes", processes, "--batch-size", 2, "--max-new-tokens", 8]
        command = [sys.executable, "-m", "eval.run", *words, *limits]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen([*map(str, command)], cwd=tmp_path, env=environment, text=True, **pipes)

    return run


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def workers(process: subprocess.Popen) -> list[int]:
    """The processes that answer, among the children of a running evaluation."""
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        commands = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    except FileNotFoundError:  # gone in the meantime
        return []
    return [child for child, command in commands.items() if b"spawn_main" in command]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def files(folder: Path) -> dict[str, bytes]:
    """Everything that a run has written, without what was measured and without files that a kill left half."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name in [name for name in found if name.endswith("results.json")]:
        found[name] = json.dumps({**json.loads(found[name]), "costs": None}).encode()
    left_out = ("run_info.json", "costs.jsonl", ".tmp")
    return {name: content for name, content in found.items() if not name.endswith(left_out)}


@pytest.mark.slow
def test_dead_worker_ends_the_run_with_a_message_and_its_answers_stay(
    start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    log = tmp_path / "out/mmstar/random/answers.jsonl"
    process = start("out", processes=2)
    wait_for(lambda: lines(log) >= 4)
    os.kill(workers(process)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a worker process died" in output and "Traceback" not in output
    assert 4 <= lines(log) < QUESTIONS
    assert not (log.parent / "results.json").exists()


@pytest.mark.slow
def test_kills_of_two_processes_change_no_byte(start: Callable[..., subprocess.Popen], tmp_path: Path) -> None:
    finish(start("calm", processes=1))
    log = tmp_path / "killed/mmstar/random/answers.jsonl"
    rng = random.Random(5)
    hit = []
    for number in range(KILLS):
        process = start("killed", processes=2)
        if number % 3 == 0:  # anywhere, so mostly before the first answer
            time.sleep(rng.uniform(0, 6))
        else:
            before = lines(log)
            wait_for(lambda process=process, before=before: lines(log) > before or process.poll() is not None)
            time.sleep(rng.uniform(0, 0.15))
        children = workers(process)
        victim = rng.choice([process.pid, *children])
        hit.append("worker" if victim in children else "main")
        if process.poll() is None:
            os.kill(victim, signal.SIGKILL)
        process.communicate(timeout=60)
        wait_for(lambda children=children: not any(map(alive, children)), seconds=30)
    assert set(hit) == {"main", "worker"} and 0 < lines(log) < QUESTIONS, (hit, lines(log))
    output = finish(start("killed", processes=2))
    assert "answers were there already" in output
    calm, killed = files(tmp_path / "calm"), files(tmp_path / "killed")
    assert killed == calm
    indices = [json.loads(line)["index"] for line in log.read_text().splitlines()]
    assert indices == list(range(QUESTIONS))
