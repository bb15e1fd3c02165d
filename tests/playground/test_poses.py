"""`llava-skip data --poses`: the same questions about digits that are turned and moved further."""

from random import Random

import numpy as np
import pytest

from playground.data import build
from playground.data.formats import training_records
from playground.data.scenes import CELLS, digit_pools, random_scene, varied


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The default data set, and one with twice the poses, of ten images each."""
    root = tmp_path_factory.mktemp("poses")
    return (
        build.ensure_built(root / "one", train_images=10),
        build.ensure_built(root / "two", train_images=10, poses=2.0),
    )


def test_texts_and_benchmarks_stay_and_images_change(folders):
    one, two = folders
    for name in ("train.json", "captions.json", "tokenizer/tokenizer.json", "eval/mmstar.tsv", "eval/mmbench.tsv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    pairs = [(path, two / path.relative_to(one)) for path in (one / "images").rglob("*.png")]
    assert len(pairs) == 10
    assert all(first.read_bytes() != second.read_bytes() for first, second in pairs)


def test_a_pose_is_as_many_times_as_far_from_upright():
    scene = random_scene(digit_pools()[0], Random(1))
    usual, strong = (varied(scene, Random(2), strength) for strength in (1.0, 2.0))
    assert len(usual.poses) == len(CELLS)
    for pose, further in zip(usual.poses, strong.poses, strict=True):
        assert further.angle == pytest.approx(2 * pose.angle)
        assert np.array(further.shift) == pytest.approx(2 * np.array(pose.shift))
        assert np.array(further.stretch) - 1 == pytest.approx(2 * (np.array(pose.stretch) - 1))


def test_strength_one_is_the_default():
    pool = digit_pools()[0]
    usual, named = (list(training_records(pool, 5, Random(3), *poses)) for poses in ((), (1.0,)))
    assert usual == named


def test_another_strength_is_another_data_set(folders):
    one, two = folders
    assert "poses" not in build.read_manifest(one)["request"]
    assert build.read_manifest(two)["request"]["poses"] == 2.0


@pytest.mark.parametrize("poses", ["-1", "5.5", "far"])
def test_a_strength_that_makes_no_sense_is_refused(poses, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["data", "--output", str(tmp_path / "digits"), "--poses", poses])
    with pytest.raises(SystemExit) as stop:
        build.main()
    assert stop.value.code == 2
    assert "--poses" in capsys.readouterr().err
    assert not (tmp_path / "digits").exists()
