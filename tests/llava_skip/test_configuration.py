import pytest

from llava_skip import LlavaSkipConfig, SkipConfig, preset_config
from llava_skip.presets import PRESETS, SIZES, preset_skip
from tests.small_models import small_config


def test_presets_have_the_numbers_of_the_paper():
    numbers = {name: (skip.retained, skip.skipped) for name, skip in PRESETS.items() if skip}
    assert numbers == {"sv-llava-64": (64, 156), "sv-llava-100": (100, 156), "sv-llava-256": (256, 320)}
    assert PRESETS["llava"] is None


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", SIZES)
def test_every_preset_exists_at_every_size(preset, size):
    config = preset_config(preset, size)
    skip = config.skip_config
    assert config.image_seq_length == (config.patches if skip is None else skip.retained + skip.skipped + 2)
    if size != "tiny":
        assert config.patches == 576
        assert skip == PRESETS[preset]


def test_another_tower_keeps_the_proportion():
    assert preset_skip("sv-llava-100", 64) == SkipConfig(11, 17)
    assert preset_skip("sv-llava-256", 64) == SkipConfig(28, 36)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="Unknown preset 'sv-llava'; known: llava, sv-llava-64"):
        preset_config("sv-llava")
    with pytest.raises(ValueError, match="Unknown size 'huge'; known: tiny"):
        preset_config("llava", "huge")


@pytest.mark.parametrize(
    ("retained", "skipped", "message"),
    [
        (16, 1, "skip.retained is 16, but the vision tower gives only 16 tokens"),
        (10, 7, r"10 \+ 7, but the vision tower gives only 16"),
        (0, 3, "skip.retained is 0"),
        (3, -1, "skip.skipped is -1"),
    ],
)
def test_impossible_sizes_are_refused(retained, skipped, message):
    with pytest.raises(ValueError, match=message):
        small_config(SkipConfig(retained, skipped))


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match=r"unknown fields \['retain'\]"):
        SkipConfig.from_dict({"retain": 3, "skipped": 2})


def test_config_survives_json(tmp_path):
    config = small_config()
    config.save_pretrained(tmp_path)
    loaded = LlavaSkipConfig.from_pretrained(tmp_path)
    assert loaded.skip_config == SkipConfig(5, 7)
    assert loaded.image_seq_length == 14
    assert loaded.to_dict() == config.to_dict()
