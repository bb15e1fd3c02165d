"""`--cache_vision_features`: an epoch writes the features of a frozen tower, later ones read them; losses stay."""

import pickle
import signal

import pytest
import torch
from safetensors.torch import load_file

from llava_skip.vision.clip import ClipTower
from llava_skip.vision.stored import TowerFeatures, crop_bytes
from llava_skip_base.errors import UserError
from llava_skip_base.files import read_json
from tests.support.interrupted import launch_and_wait, outcome, write_inputs
from tests.support.runs import losses, train
from tests.support.small_models import ARCHITECTURES, batch_of, mixed_samples, small_config, small_model
from train.data import features as features_module
from train.data.features import FeatureCollator, FeatureShards, FeatureWriter, crop_key
from train.recipe import features as recipe_features
from train.recipe.features import features_folder
from train.run import check, parse


def states_of(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    layer = torch.randn(5, 8, generator=generator).bfloat16()
    return {"layer2": layer, "scores": torch.rand(4, generator=generator)}


@pytest.fixture
def shards(tmp_path):
    """Two shards of three crops each."""
    found = FeatureShards(tmp_path / "features")
    for first in (0, 3):
        found.write({f"crop{n}": states_of(n) for n in range(first, first + 3)}, "rank0")
    return found


def test_shards_give_back_the_very_bits_in_any_process(shards):
    for own in (shards, FeatureShards(shards.folder), pickle.loads(pickle.dumps(shards))):
        assert len(own) == 6
        found = own.find(["crop4", "crop0"])
        assert found.were_stored and len(found) == 2
        for name, state in found.states.items():
            assert torch.equal(state, torch.stack([states_of(4)[name], states_of(0)[name]]))
            assert state.dtype == states_of(0)[name].dtype


def test_a_batch_with_a_crop_that_is_not_there_passes_through_the_tower(shards):
    missing = shards.find(["crop1", "crop9"])
    assert not missing.were_stored and missing.damaged == 0
    FeatureShards(shards.folder).write({"crop9": states_of(9)}, "rank1")  # another process
    assert shards.find(["crop1", "crop9"]).were_stored


def test_a_shard_that_was_cut_is_made_again_and_said(shards):
    first, second = sorted(shards.folder.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-10])
    again = FeatureShards(shards.folder)
    assert again.damaged == {first.name} and len(again) == 3
    assert not again.find(["crop0"]).were_stored and again.find(["crop3"]).were_stored
    second.write_bytes(b"no shard")
    assert FeatureShards(shards.folder).damaged == {first.name, second.name}


def test_a_wrong_byte_is_found_counted_and_repaired(shards):
    path = sorted(shards.folder.glob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the last tensor
    path.write_bytes(content)
    again = FeatureShards(shards.folder)
    (damaged,) = [n for n in range(3) if not FeatureShards(shards.folder).find([f"crop{n}"]).were_stored]
    keys = [f"crop{n}" for n in range(3)]
    found = again.find(keys)
    assert (found.were_stored, found.damaged) == (False, 1)
    found.states |= {name: torch.stack([states_of(n)[name] for n in range(3)]) for name in states_of(0)}
    writer = FeatureWriter(FeatureShards(shards.folder), rank=0)  # has not seen the damage itself
    writer.keep(found)
    writer.flush()
    assert writer.counts == {"read": 0, "computed": 3, "damaged": 1}
    assert len(load_file(sorted(shards.folder.glob("*.safetensors"))[-1])) == 2  # the damaged crop alone
    for own in (again, FeatureShards(shards.folder)):
        assert torch.equal(own.find(keys).states["layer2"][damaged], states_of(damaged)["layer2"])


def test_a_full_disk_ends_the_storing_and_not_the_run(shards, monkeypatch, capsys):
    def full(path, content):
        raise OSError(28, "No space left on device")

    writer = FeatureWriter(shards, rank=0)
    monkeypatch.setattr(features_module, "write_bytes", full)
    for number in (7, 8):
        states = {name: state[None] for name, state in states_of(number).items()}
        features = TowerFeatures([f"crop{number}"])
        features.states |= states
        writer.keep(features)
        writer.flush()
    said = capsys.readouterr().err
    assert said.count("takes no more features, so the tower runs where they are missing") == 1
    assert "No space left" in said and writer.counts["computed"] == 2 and len(FeatureShards(shards.folder)) == 6


def test_a_crop_is_named_by_its_pixels():
    crop = torch.rand(3, 4, 4)
    other = crop.clone()
    other[0, 0, 0] += 1e-6
    assert crop_key(crop) == crop_key(crop.clone()) != crop_key(other)
    assert crop_key(crop) != crop_key(crop.reshape(3, 2, 8))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_forward_from_stored_features_is_equal_to_the_bit(architecture, tmp_path, monkeypatch):
    model = small_model(architecture=architecture).train()
    model.model.vision_tower.requires_grad_(False)
    inputs = batch_of(mixed_samples(model), "right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    shards = FeatureShards(tmp_path)
    collate, writer = FeatureCollator(lambda samples: dict(samples[0]), shards), FeatureWriter(shards, 0)

    def step(batch):
        model.zero_grad()
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected, first = step(inputs), collate([inputs])
    filled = step(first)
    writer.keep(first["vision_features"])
    writer.flush()
    stored = sum(state[0].nbytes for state in first["vision_features"].states.values())
    assert crop_bytes(model.config, torch.float32) == stored
    batch = collate([inputs])
    assert "pixel_values" not in batch and batch["vision_features"].were_stored
    monkeypatch.setattr(ClipTower, "_embed", None)  # the tower cannot run
    for results in (filled, step(batch)):
        assert len(results) == len(expected) and all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_on_a_device_numbers_keep_their_type():
    moved = TowerFeatures(["a"], {"layer2": states_of(1)["layer2"][None], "scores": states_of(1)["scores"][None]})
    assert moved.to("cpu", non_blocking=True).states["scores"].dtype == torch.float32
    assert moved.to("cpu").were_stored and not TowerFeatures(["a"]).to("cpu").were_stored


@pytest.fixture
def inputs(tmp_path):
    """A model and 22 records, 14 of them with an image of its own."""
    return write_inputs(tmp_path, dropout=0.0)


def test_a_run_with_stored_features_learns_the_same(inputs, tmp_path, monkeypatch, capfd):
    """Two epochs and more: the first writes, later ones read; a second run reads from its start."""
    monkeypatch.setattr(features_module, "SHARD_BYTES", 2000)
    arguments, folder = [*inputs, "--logging_steps", "1"], tmp_path / "features"
    plain = train(tmp_path / "plain", *arguments)
    capfd.readouterr()
    one = train(tmp_path / "one", *arguments, "--cache_vision_features", str(folder))
    said = capfd.readouterr().err
    assert "about 14 images" in said and "holds the features of 0 crops" in said
    assert losses(one) == losses(plain) and len(losses(one)) == 13
    assert [entry["grad_norm"] for entry in one["history"]] == [entry["grad_norm"] for entry in plain["history"]]
    counts = one["vision_features"]
    assert counts["computed"] >= 14 and counts["read"] >= 14 and counts["damaged"] == 0
    assert len(list(folder.glob("*/*.safetensors"))) > 1

    shard = sorted(folder.glob("*/*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:100])
    two = train(tmp_path / "two", *arguments, "--cache_vision_features", str(folder), "--dataloader_num_workers", "1")
    assert "1 shards are damaged, and what they held is made again" in capfd.readouterr().err
    assert losses(two) == losses(plain)
    assert 0 < two["vision_features"]["computed"] < counts["computed"]
    assert "vision_features" not in plain


def assert_alike(one, other):
    assert one["history"] == other["history"] and one["sums"] == other["sums"]
    assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())


def test_a_run_that_is_killed_continues_with_what_was_written(attempt, inputs, tmp_path):
    ends, folder = [], tmp_path / "features"
    for name, more in (("plain", ()), ("stored", ("--cache_vision_features", str(folder)))):
        given = [*inputs, *more, "--output_dir", str(tmp_path / name)]
        if more:
            assert attempt(given, "training_step", 8)["code"] == -signal.SIGKILL
            assert len(list(folder.glob("*/*.safetensors"))) > 1  # of the checkpoints
        end = attempt(given)
        assert end["code"] == 0, end["output"]
        ends.append(outcome(tmp_path / name))
    assert_alike(*ends)


@pytest.mark.slow
def test_two_processes_with_deepspeed_read_what_either_wrote(tmp_path):
    inputs = [*write_inputs(tmp_path), "--deepspeed", "zero2", "--per_device_train_batch_size", "2"]
    ends, folder = [], tmp_path / "features"
    for name, more in (("plain", ()), ("one", ("--cache_vision_features", str(folder))),
                       ("two", ("--cache_vision_features", str(folder)))):  # fmt: skip
        end = launch_and_wait([*inputs, *more, "--output_dir", str(tmp_path / name)])
        assert end["code"] == 0, end["output"]
        ends.append(outcome(tmp_path / name))
    assert_alike(ends[0], ends[1])
    assert_alike(ends[0], ends[2])
    shards = [path.name for path in folder.glob("*/*.safetensors")]
    assert {name.split("-")[1] for name in shards} == {"rank0", "rank1"}
    counts = [read_json(tmp_path / name / "train_result.json")["vision_features"] for name in ("one", "two")]
    assert counts[0]["computed"] and counts[0]["read"]
    assert counts[1]["computed"] == 0 and counts[1]["read"] == sum(counts[0].values())


def checked(inputs, *more):
    return check(*parse([*inputs, "--output_dir", "unused", "--cache_vision_features", "f", *more]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--train_parts", "vision_tower", "summary"), "is for a frozen tower, .* give --train_parts summary"),
        (("--deepspeed", "zero3"), "does not go with ZeRO-3"),
        (("--streaming", "true"), "needs a set whose size is known"),
    ],
)
def test_runs_whose_features_cannot_be_stored_are_refused(inputs, more, message):
    with pytest.raises(UserError, match=f"^--cache_vision_features {message}"):
        checked(inputs, *more)


def test_a_file_in_place_of_the_folder_is_refused(inputs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file: give a folder"):
        check(*parse([*inputs, "--output_dir", "unused", "--cache_vision_features", str(tmp_path / "file")]))


def test_a_disk_without_room_is_refused_before_the_run(inputs, tmp_path, monkeypatch):
    run = checked(inputs)
    records = run.dataset.records
    assert "at most for about 14 images" in recipe_features.say_size(tmp_path / "f", records, run.config, torch.float32)
    usage = recipe_features.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(recipe_features.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match="would take .* are free there: give another one"):
        recipe_features.say_size(tmp_path / "f", records, run.config, torch.float32)


@pytest.mark.slow
def test_another_tower_or_processor_has_another_folder(inputs, tmp_path):
    run = checked(inputs)
    folders = []
    for change in (None, "weights", "layer", "processor"):
        config, processor, tower = (
            small_config(),
            pickle.loads(pickle.dumps(run.processor)),
            ClipTower(small_config().vision_config),
        )
        tower.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in tower.state_dict().items()})
        if change == "weights":
            tower.encoder.layers[0].mlp.fc1.bias.data[0] = 1e-7
        if change == "layer":
            config.vision_feature_layer = -1
        if change == "processor":
            processor.image_processor.do_pad = False
        folders.append(features_folder(tmp_path, tower, config, processor))
    assert len(set(folders)) == 4
