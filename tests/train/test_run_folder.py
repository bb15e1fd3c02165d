import hashlib
import json

import pytest

from llava_skip_base.errors import UserError
from train.arguments import RunArguments
from train.resilience import run_folder as folder
from train.resilience.checkpoint import Manifest, find_checkpoint, flush, seal
from train.resilience.run_folder import RunFolder


def test_a_folder_that_a_rank_does_not_see_is_refused(tmp_path, monkeypatch):
    run = RunFolder(RunArguments(output_dir=str(tmp_path / "run"), use_cpu=True), {"model": {}}, None)
    monkeypatch.setattr(folder, "gather_object", lambda own: [*own, "rank 8 on node2"])
    with pytest.raises(ValueError, match="run is not seen by rank 8 on node2: give a folder that all machines share"):
        run.open()


def test_overwriting_keeps_nothing_but_the_lock(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "train_result.json").write_text("{}")
    run = RunFolder(RunArguments(output_dir=str(tmp_path), use_cpu=True, overwrite=True), {"model": {}}, None)
    assert not run.is_finished() and run.open() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.json"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    run = RunFolder(RunArguments(output_dir=str(tmp_path / "file" / "run"), use_cpu=True), {"model": {}}, None)
    with pytest.raises(
        ValueError, match="OUTPUT .*file/run cannot be written: .*Not a directory.* Give a folder of your"
    ):
        run.open()


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "weights").write_text("weights")
    return folder


def test_a_checkpoint_is_whole_once_it_has_its_manifest(checkpoint):
    seal(checkpoint, Manifest(step=3, world_size=1, zero_stage=None, files=flush(checkpoint)))
    (checkpoint.parent / ".unfinished").write_text("checkpoint-3")  # killed before this file was deleted
    assert find_checkpoint(checkpoint.parent) == (checkpoint, [])
    assert not (checkpoint.parent / ".unfinished").exists()


def test_a_file_of_the_same_size_that_is_another_is_a_damage(checkpoint):
    seal(checkpoint, Manifest(step=3, world_size=1, zero_stage=None, files=flush(checkpoint)))
    (checkpoint / "weights").write_text("weightz")
    with pytest.raises(UserError, match=r"checkpoint-3: weights with its 7 bytes is not what was written"):
        find_checkpoint(checkpoint.parent)


def test_a_manifest_with_sizes_of_an_earlier_version_still_counts(checkpoint):
    seal(checkpoint, Manifest(step=3, world_size=1, zero_stage=None, files={"weights": 7}))
    assert find_checkpoint(checkpoint.parent) == (checkpoint, [])
    (checkpoint / "weights").write_text("short")
    with pytest.raises(UserError, match="weights has 5 bytes, not 7"):
        find_checkpoint(checkpoint.parent)


def test_each_process_reads_the_files_that_it_has_written(checkpoint):
    states = checkpoint / "global_step3"
    states.mkdir()
    names = ["bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "zero_pp_rank_2_mp_rank_00_model_states.pt"]
    for name in (*names, "mp_rank_00_model_states.pt"):
        (states / name).write_text(name)
    (checkpoint / "rng_state_1.pth").write_text("")
    parts = [flush(checkpoint, rank, 3) for rank in range(3)]
    assert [sorted(part) for part in parts] == [
        ["global_step3/mp_rank_00_model_states.pt", "weights"],
        [f"global_step3/{names[0]}", "rng_state_1.pth"],
        [f"global_step3/{names[1]}"],
    ]
    assert parts[0]["weights"] == hashlib.sha256(b"weights").hexdigest()


WHOLE = {"step": 3, "world_size": 1, "zero_stage": None, "progress": {}, "files": {}}
WRONG = [
    {"step": "3"}, {"step": True}, {"world_size": 0}, {"zero_stage": [2]}, {"zero_stage": 7}, {"progress": []},
    {"files": ["weights"]}, {"files": {"weights": "e3b0"}}, {"files": {"weights": -1}}, {"files": {"../x": 7}},
    {"files": {"/etc/passwd": 7}}, {"files": {"a\0b": 7}},
]  # fmt: skip


@pytest.mark.parametrize("content", ["", "[3]", '{"step": 3}', *(json.dumps(WHOLE | wrong) for wrong in WRONG)])
def test_a_manifest_that_cannot_be_read_is_a_damage(checkpoint, content):
    (checkpoint / "checkpoint.json").write_text(content)
    with pytest.raises(UserError, match=r"is whole \(checkpoint-3: its checkpoint.json cannot be read: .*restore one"):
        find_checkpoint(checkpoint.parent)


def test_only_the_checkpoint_that_was_being_written_is_deleted(checkpoint):
    with pytest.raises(UserError, match=r"is whole \(checkpoint-3: it has no checkpoint.json"):
        find_checkpoint(checkpoint.parent)
    (checkpoint.parent / ".unfinished").write_text("checkpoint-3")
    found, messages = find_checkpoint(checkpoint.parent)
    assert found is None and "checkpoint-3 was being written" in messages[0] and not checkpoint.exists()
