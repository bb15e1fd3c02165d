import json

import pytest

from llava_skip_base.errors import UserError
from train.arguments import RunArguments
from train.resilience import run_folder as folder
from train.resilience.resume import Manifest, find_checkpoint, seal
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
    seal(checkpoint, Manifest(step=3, world_size=1, zero_stage=None))
    (checkpoint.parent / ".unfinished").write_text("checkpoint-3")  # killed before this file was deleted
    assert find_checkpoint(checkpoint.parent) == (checkpoint, [])
    assert not (checkpoint.parent / ".unfinished").exists()


@pytest.mark.parametrize("content", ["", "[3]", json.dumps({"step": 3})])
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
