"""The job scripts: their commands, and jobs on a real SLURM of two nodes on this machine."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from playground.data.build import ensure_built

ROOT = Path(__file__).parents[2]
JOB = "scripts/slurm/finetune_skip.sbatch"
STEPS = 24


def shell_environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    path = f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"
    return kept | {"VIRTUAL_ENV": sys.prefix, "PATH": path, "OMP_NUM_THREADS": "1", **variables}


def call(*command: str, **variables: str) -> str:
    result = subprocess.run(
        command, cwd=ROOT, env=shell_environment(**variables), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, (command, result.stdout[-2000:], result.stderr[-4000:])
    return result.stdout


def test_a_dry_run_shows_the_commands_of_any_number_of_nodes():
    variables = {
        "MODEL": "lmsys/vicuna-7b-v1.5",
        "DATA": "mix.json",
        "IMAGES": "my images",
        "NPROC": "8",
        "ZERO": "3",
    }
    srun, launch = call("bash", JOB, "--dry-run", "--max_steps", "5", NODES="16", **variables).splitlines()
    assert srun.startswith("srun --ntasks-per-node=1 --kill-on-bad-exit=1 ") and "finetune_skip.sh" in srun
    for part in (
        "-m train.launch --nnodes 16 --rdzv_backend c10d --rdzv_endpoint HEAD_NODE:20000 --rdzv_id 0-0",
        "--redirects 3 --tee 0:3 --log-dir logs/0/0/NODE --nproc_per_node 8",
        "-m train.train --deepspeed scripts/zero3.json",
        "--model lmsys/vicuna-7b-v1.5",
        "--images my\\ images",
        "--max_steps 5",
    ):
        assert part in launch


def test_a_dry_run_shows_the_command_of_an_evaluation():
    shown = call("bash", "scripts/slurm/eval.sbatch", "--dry-run", "--benchmarks", "mmstar", "--limit", "5")
    assert shown.strip() == f"srun --ntasks=1 {sys.prefix}/bin/python -m eval.run --benchmarks mmstar --limit 5"


def test_a_job_that_is_not_submitted_from_the_project_says_so(tmp_path):
    shutil.copy(ROOT / JOB, tmp_path)
    (tmp_path / "scripts/slurm").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/slurm/job.sh", tmp_path / "scripts/slurm")
    result = subprocess.run(
        ["bash", "finetune_skip.sbatch", "--dry-run"],
        cwd=tmp_path,
        env=shell_environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "error: submit the job from the project's folder" in result.stderr


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if missing := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)} missing): apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("a SLURM of two nodes on one machine needs root")
    folder = tmp_path_factory.mktemp("slurm")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(min(probe.getsockname()[1], 65000))
    call("bash", "scripts/slurm/local_cluster.sh", "start", str(folder), PORT=port)
    yield {"SLURM_CONF": str(folder / "slurm.conf")}
    call("bash", "scripts/slurm/local_cluster.sh", "stop", str(folder))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return ensure_built(tmp_path_factory.mktemp("digits") / "digits", train_images=64)


class Job:
    """A job in the queue; `folder` is for its log."""

    def __init__(self, cluster, folder, *command, **variables):
        self.cluster, self.log = cluster, folder / "job.log"
        folder.mkdir(exist_ok=True)
        submit = ["sbatch", "--parsable", "--output", str(self.log), *command]
        self.number = call(*submit, **variables, **cluster).strip()

    def wait(self, condition, seconds=240):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.log.read_text()[-6000:] if self.log.exists() else "no log"
            time.sleep(0.2)

    def state(self):
        shown = call("scontrol", "show", "job", self.number, **self.cluster)
        return dict(part.split("=", 1) for part in shown.split() if "=" in part)

    def ended(self):
        return self.state()["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    def result(self, file):
        assert self.state()["JobState"] == "COMPLETED", self.log.read_text()[-6000:]
        return json.loads(file.read_text())


def training(cluster, digits, folder, nodes="2"):
    """A training of one process a node, on two nodes if `nodes` does not say otherwise, into `folder / "run"`."""
    variables = {"DATA": str(digits / "train.json"), "IMAGES": str(digits / "images"), "OUTPUT": str(folder / "run")}
    variables |= {"NPROC": "1", "BATCH": "4", "LOGS": str(folder / "logs")}
    arguments = ["--tokenizer", str(digits / "tokenizer"), "--max_steps", str(STEPS), "--logging_steps", "1"]
    return Job(cluster, folder, "--nodes", nodes, JOB, *arguments, "--save_steps", "9", **variables)


@pytest.fixture(scope="module")
def undisturbed(cluster, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    job = training(cluster, digits, folder)
    job.wait(job.ended)
    return job.result(folder / "run/train_result.json")


@pytest.mark.slow
def test_a_preempted_two_node_job_is_requeued_and_ends_with_the_same_loss(cluster, digits, undisturbed, tmp_path):
    job = training(cluster, digits, tmp_path / "preempted")
    job.wait((tmp_path / "preempted/run/checkpoint-9").exists)
    call("scancel", "--signal=USR1", "--batch", job.number, **cluster)  # what SLURM sends before the time limit
    job.wait(lambda: job.state()["Restarts"] == "1")
    job.wait(job.ended)
    result = job.result(tmp_path / "preempted/run/train_result.json")
    assert 9 <= result["continued_from_step"] < STEPS
    losses, expected = ([e["loss"] for e in r["history"]] for r in (result, undisturbed))
    assert len(losses) == STEPS and losses == pytest.approx(expected, abs=1e-5)
    assert result["samples"] == undisturbed["samples"] == STEPS * 2 * 4
    log = job.log.read_text()
    assert "saving step" in log and "goes back into the queue" in log and "continuing from" in log
    assert len(list((tmp_path / "preempted/logs").rglob("stderr.log"))) == 4  # two attempts, two nodes


@pytest.mark.slow
def test_a_job_that_is_requeued_on_fewer_nodes_continues(cluster, digits, undisturbed, tmp_path):
    for _ in range(240):  # a node that has just ended a job is not idle at once, and the job would do without it
        if len(call("sinfo", "--noheader", "--Node", "--states=idle", **cluster).splitlines()) == 2:
            break
        time.sleep(0.5)
    job = training(cluster, digits, tmp_path / "fewer", nodes="1-2")
    job.wait((tmp_path / "fewer/run/checkpoint-9").exists)
    assert job.state()["NumNodes"] == "2"
    call("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test", **cluster)
    try:
        call("scancel", "--signal=USR1", "--batch", job.number, **cluster)
        job.wait(lambda: job.state()["Restarts"] == "1")
        job.wait(job.ended)
    finally:
        call("scontrol", "update", "NodeName=n2", "State=RESUME", **cluster)
    result = job.result(tmp_path / "fewer/run/train_result.json")
    assert result["processes"] == 1 and 9 <= result["continued_from_step"] < STEPS
    losses, expected = ([e["loss"] for e in r["history"]] for r in (result, undisturbed))
    assert len(losses) == STEPS and losses == pytest.approx(expected, abs=1e-4)
    assert result["samples"] == undisturbed["samples"]
    log = job.log.read_text()
    assert "was written by 2 processes under ZeRO-2, and this run has 1 process under ZeRO-2" in log


@pytest.mark.slow
def test_a_cancelled_job_stays_cancelled(cluster, digits, tmp_path):
    job = training(cluster, digits, tmp_path / "cancelled")
    job.wait((tmp_path / "cancelled/run/run.json").exists)
    call("scancel", job.number, **cluster)
    job.wait(job.ended)
    time.sleep(3)
    assert job.state()["JobState"] == "CANCELLED" and job.state()["Restarts"] == "0"


@pytest.mark.slow
def test_a_preempted_evaluation_is_requeued_and_loses_nothing(cluster, digits, saved, tmp_path):
    given = ["--benchmarks", "mmstar", "--data", str(digits / "eval/mmstar.tsv"), "--model", str(saved)]
    given += ["--output", str(tmp_path / "results"), "--batch-size", "4", "--max-new-tokens", "8"]
    job = Job(cluster, tmp_path / "job", "scripts/slurm/eval.sbatch", *given)
    folder = tmp_path / "results/mmstar" / saved.name
    job.wait(lambda: (folder / "answers.jsonl").is_file() and (folder / "answers.jsonl").stat().st_size)
    call("scancel", "--signal=USR1", "--batch", job.number, **cluster)
    job.wait(lambda: job.state()["Restarts"] == "1")
    job.wait(job.ended)
    assert job.result(folder / "results.json")["counts"]["questions"] == 400
    assert 0 < job.result(folder / "run_info.json")["resumed"] < 400
    assert "goes back into the queue" in job.log.read_text()


COMMANDS = [
    block.split("```")[0]
    for block in (ROOT / "docs/cluster.md").read_text().split("```bash\n")[1:]
    if "local_cluster" not in block.split("```")[0]  # the `cluster` fixture runs these
]
SBATCH = """#!/usr/bin/env bash
while [[ $1 != *.sbatch ]]; do
    [ "$1" != --nodes ] || export NODES=$2
    shift
done
exec bash "$1" --dry-run "${@:2}"
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_on_clusters(command, tmp_path):
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    shown = call("bash", "-c", f'export PATH="{tmp_path}:$PATH"\n{command}', DRY_RUN="1")
    assert "-m train.train" in shown or "-m eval.run" in shown
    if "--nodes 4" in command or "NODES=4" in command:
        assert "--nnodes 4" in shown
