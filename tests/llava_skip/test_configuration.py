import re
from dataclasses import fields
from pathlib import Path

import pytest

from llava_skip import LlavaSkipConfig, SkipConfig, preset_config
from llava_skip.presets import PRESETS, SIZES, preset_skip
from tests.support.small_models import small_config

PAGE = Path(__file__).parents[2] / "docs/add-a-variant.md"


def test_presets_have_the_numbers_of_the_paper():
    numbers = {n: (p.front_end, p.skip.retained, p.skip.skipped) for n, p in PRESETS.items() if p.skip}
    assert numbers == {
        "sv-llava-64": ("llava", 64, 156),
        "sv-llava-100": ("llava", 100, 156),
        "sv-llava-256": ("llava", 256, 320),
        "sv-llava-hd": ("hd", 576, 576),
        "sv-cos": ("cos", 272, 256),
    }
    sv_cos = PRESETS["sv-cos"].skip
    assert sv_cos.spans == ((16, 272), (272, 528)) and sv_cos.skipping.index(True) == 273 and not sv_cos.skipping[528]
    assert (sv_cos.length, sv_cos.num_kept, sv_cos.num_skipping) == (530, 275, 255)  # method, section 0: C


# The most image tokens that an image takes (method, section 0; the paper's tables).
IMAGE_LENGTHS = {
    "llava": 576,
    "sv-llava-64": 222,
    "sv-llava-100": 258,
    "sv-llava-256": 578,
    "llava-hd": 2880,
    "sv-llava-hd": 1154,
    "cos": 1296,
    "cos-336": 336,
    "cos-80": 80,
    "sv-cos": 530,
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", SIZES)
def test_every_preset_exists_at_every_size(preset, size):
    config = preset_config(preset, size)
    assert config.front_end == PRESETS[preset].front_end and (config.skip is None) == (PRESETS[preset].skip is None)
    if size == "tiny":
        assert config.image_seq_length < IMAGE_LENGTHS[preset]
    else:
        assert config.image_seq_length == IMAGE_LENGTHS[preset]
        assert config.skip_config == PRESETS[preset].skip
        assert config.vision_config.image_size == (448 if config.front_end == "cos" else 336)


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


def test_the_page_on_variants_tells_why_a_token_is_skipped(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.splitlines() == ["578 (256, 577)", "False True", "tensor(True)"]
    text = PAGE.read_text(encoding="utf-8")
    assert [field.name for field in fields(SkipConfig) if f"`{field.name}`" not in text] == []


def test_a_missing_number_is_named():
    with pytest.raises(ValueError, match=r"skip lacks \['skipped'\]"):
        SkipConfig.from_dict({"retained": 3})
