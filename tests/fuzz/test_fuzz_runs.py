"""Random damage to a run's folder: its manifest and its record are read, named as damaged, or refused in one message.

Seeded, so that a failure can be repeated; FUZZ_ROUNDS multiplies the number of tries.
"""

import json
import os
import random
from dataclasses import asdict

import pytest
import torch

from llava_skip_base.errors import UserError
from tests.support.damage import damaged
from train.resilience.checkpoint import MANIFEST, Manifest, digest, find_fault, seal
from train.resilience.layout import read_record
from train.resilience.loading import check_states

ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "1"))


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-3"
    (folder / "global_step3").mkdir(parents=True)
    torch.save({"step": 3, "state": torch.arange(4.0)}, folder / "global_step3" / "mp_rank_00_model_states.pt")
    (folder / "model.safetensors").write_bytes(b"weights")
    files = {str(file.relative_to(folder)): digest(file) for file in folder.rglob("*") if file.is_file()}
    seal(folder, Manifest(3, 2, 2, {"seconds": 1.5, "counts": {"rows": 7}}, files))
    assert find_fault(folder) is None
    return folder


def test_a_damaged_manifest_is_a_fault_in_words(checkpoint):
    rng, text = random.Random(0), (checkpoint / MANIFEST).read_text()
    faults = 0
    for _ in range(300 * ROUNDS):
        (checkpoint / MANIFEST).write_text(damaged(json.loads(text), rng))
        fault = find_fault(checkpoint)
        faults += fault is not None
        assert fault is None or (isinstance(fault, str) and len(fault) < 2000)
        if fault is None:  # what it says is then what a run could have written
            manifest = asdict(Manifest.read(checkpoint))
            assert manifest["step"] >= 0 and manifest["world_size"] >= 1
    assert faults > 200 * ROUNDS


def test_damaged_states_are_refused_unopened_or_hold_data_alone(checkpoint):
    state = checkpoint / "global_step3" / "mp_rank_00_model_states.pt"
    rng, whole = random.Random(1), state.read_bytes()
    for _ in range(150 * ROUNDS):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 2, 30])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        state.write_bytes(bytes(content[: rng.choice([len(content), rng.randrange(len(content))])]))
        try:
            check_states(checkpoint)
        except UserError as error:
            assert len(str(error)) < 2000


def test_a_damaged_record_of_a_run_is_one_message(tmp_path):
    record = {"model": {"preset": "llava"}, "data": {"data": "x"}, "training": {"seed": 1, "world_size": 2}}
    record["layout"] = {"processes": 2, "batch": 4, "accumulation": 1}
    rng = random.Random(2)
    for _ in range(200 * ROUNDS):
        (tmp_path / "run.json").write_text(damaged(record, rng))
        try:
            read_record(tmp_path)
        except UserError as error:
            assert len(str(error)) < 2000
