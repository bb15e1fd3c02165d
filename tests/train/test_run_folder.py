import pytest

from train.arguments import RunArguments
from train.resilience import run_folder as folder
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
