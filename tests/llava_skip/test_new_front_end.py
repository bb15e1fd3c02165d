"""`llava-skip convert --new-projector`: another front end on a trained tower and language model."""

import pytest
import torch

from llava_skip import LlavaSkipForConditionalGeneration, LlavaSkipProcessor
from llava_skip.checkpoints.names import HEAD, LANGUAGE_MODEL, POSITIONS, PROJECTOR, TOWER
from llava_skip.convert import convert
from llava_skip.vision.clip import resize_positions
from llava_skip_base.errors import UserError
from tests.support.conversations import random_image


@pytest.mark.parametrize("preset", ["cos", "sv-cos", "llava-hd", "sv-llava-hd"])
def test_tower_and_language_model_stay(saved_dense, tmp_path, preset):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert(str(saved_dense), tmp_path / name, preset=preset, new_projector="tiny", seed=seed)
    old = LlavaSkipForConditionalGeneration.from_pretrained(saved_dense).state_dict()
    model = LlavaSkipForConditionalGeneration.from_pretrained(tmp_path / "a")
    again, other = (
        LlavaSkipForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in ("b", "c")
    )
    assert model.config.preset == preset
    kept = 0
    for name, tensor in model.state_dict().items():
        if name == POSITIONS:
            assert torch.equal(tensor, resize_positions(old[name], tensor.shape[0] - 1))
        elif name.startswith((TOWER, LANGUAGE_MODEL, HEAD)):
            kept += 1
            assert torch.equal(tensor, old[name]), name
        assert torch.equal(tensor, again[name]), name
    assert kept > 90
    assert not all(torch.equal(model.state_dict()[name], other[name]) for name in other if name.startswith(PROJECTOR))
    processor = LlavaSkipProcessor.from_pretrained(tmp_path / "a")
    inputs = processor(images=[random_image()], text="<image>\nWhat?", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1


def test_what_does_not_go_together_is_refused_before_a_model_loads(tmp_path):
    for given, words in (
        ({"new_projector": "tiny"}, "--preset"),
        ({"new_projector": "tiny", "preset": "cos", "reduction": "random:4"}, "--reduction"),
        ({"new_projector": "tiny", "preset": "none-such"}, "none-such"),
        ({"new_projector": "13b", "preset": "cos"}, "13b"),
    ):
        with pytest.raises(UserError, match=words):
            convert(str(tmp_path / "nowhere"), tmp_path / "out", **given)
