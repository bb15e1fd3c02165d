"""The table of what an image costs."""

from pathlib import Path

import pytest

from eval.study.costs import line, training_step, whole_line
from llava_skip import SkipConfig
from llava_skip.presets import PRESETS, Preset, dense_preset, preset_config
from llava_skip.vision.front_end import _FRONT_ENDS
from llava_skip.vision.llava import LlavaFrontEnd

PAGE = Path(__file__).parents[2] / "docs/costs.md"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_page_has_the_numbers_of_the_presets(preset):
    assert line(preset, "tiny") in PAGE.read_text(encoding="utf-8")
    for size in ("tiny", "llama3-8b"):
        assert whole_line(preset, size) in PAGE.read_text(encoding="utf-8")


def test_the_parts_of_a_step_are_the_whole_and_the_shares_are_those_of_the_dense_model():
    cells = [float(cell.strip(" %")) for cell in whole_line("sv-llava-256", "llama3-8b").split("|")[2:-1]]
    assert sum(cells[:5]) == pytest.approx(cells[5], rel=0.01)
    own, dense = (training_step(preset_config(name, "llama3-8b")).model for name in ("sv-llava-256", "llava"))
    assert cells[6] == pytest.approx(100 * own / dense, abs=0.06) and 60 < cells[6] < 66
    assert whole_line("llava", "llama3-8b").count("100.0%") == 3


def test_a_preset_is_compared_with_the_dense_one_of_its_front_end(monkeypatch):
    assert [dense_preset(name) for name in ("sv-llava-64", "sv-llava-hd", "sv-cos", "cos")] == [
        "llava", "llava-hd", "cos", "cos"
    ]  # fmt: skip
    monkeypatch.setitem(_FRONT_ENDS, "other", type("Other", (LlavaFrontEnd,), {"name": "other"})())
    monkeypatch.setitem(PRESETS, "sv-other", Preset("sv-other", SkipConfig(100, 156), front_end="other"))
    assert dense_preset("sv-other") == "llava"
    assert line("sv-other", "tiny").split("|")[2:] == line("sv-llava-100", "tiny").split("|")[2:]
