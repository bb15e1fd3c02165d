"""What is drawn of an image, against what the model does with it."""

import pytest
import torch

from llava_skip.pictures import (
    OUTLINE,
    crops_image,
    draw_heat,
    draw_merges,
    draw_retained,
    image_parts,
)
from llava_skip.tokens import merge_tokens
from tests.support.small_models import ARCHITECTURES, SKIP, small_config, small_model

SKIPPING = [name for name in ARCHITECTURES if name.startswith("sv-")]


def crops_of(model, count: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count or (5 if model.front_end.cuts_tiles else 1), 3, 16, 16, generator=generator)


@pytest.mark.parametrize("architecture", SKIPPING)
def test_parts_say_where_each_visual_token_goes(architecture):
    """The token that parts name is the mean of these, as the model makes it; the summaries are as it makes them."""
    model = small_model(architecture=architecture).model
    crops, skip = crops_of(model), model.config.skip_config
    counts = torch.tensor([len(crops)])
    with torch.no_grad():
        parts = image_parts(model, crops)
        (group,) = model.front_end.encode(model.vision_tower, model.multi_modal_projector, crops, counts, model.config)
        visual = group.tokens[0]
        tokens = torch.cat([visual[: skip.retained], merge_tokens(visual[None, skip.retained :], skip.skipped)[0]])
        block = model.encode_images(crops, counts)[0]
    assert len(parts.places) == len(parts.tokens) == len(parts.keeps) == len(visual)
    assert parts.retained == skip.retained and parts.tokens[: skip.retained] == list(range(skip.retained))
    where = torch.tensor(parts.tokens)
    for token in range(skip.retained + skip.skipped):
        assert torch.allclose(visual[where == token].mean(0), tokens[token], atol=1e-5)
        assert sum(keeps for keeps, own in zip(parts.keeps, parts.tokens, strict=True) if own == token) == 1
    for number, place in enumerate(skip.summary_positions):
        weights = torch.tensor(parts.summaries[number])
        assert torch.allclose(weights @ tokens, block[place], atol=1e-5)
        assert sum(parts.heat(number)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("architecture", ["llava", "sv-llava", "llava-hd"])
def test_a_patch_of_the_tower_is_where_its_place_is(architecture):
    """With the other pixels changed in the embedding alone, only the patch at the place changes."""
    model = small_model(architecture=architecture).model
    crops = crops_of(model, 1)
    with torch.no_grad():
        places = model.front_end.places(model, crops)
        (crop, (left, top, right, bottom)) = places[3]
        changed = crops.clone()
        changed[crop, :, top:bottom, left:right] += 1
        differs = (model.vision_tower.embeddings(crops) - model.vision_tower.embeddings(changed)).abs().sum(-1)[0, 1:]
    index = int(differs.argmax())
    assert (differs > 0).sum() == 1
    assert (left, top) == (4 * (index % 4), 4 * (index // 4)) and (right - left, bottom - top) == (4, 4)


def test_windows_of_chain_of_sight_are_where_their_features_are():
    model = small_model(architecture="cos").model
    places = model.front_end.places(model, crops_of(model))
    boxes = [place.box for place in places]
    # Windows of 4 x 4 features are the whole image with 4 queries; of 2 x 2, four windows with 2 queries each.
    assert boxes[:4] == [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]
    assert boxes[4:8] == [(0, 0, 4, 8), (4, 0, 8, 8), (8, 0, 12, 8), (12, 0, 16, 8)] and len(boxes) == 12


@pytest.mark.parametrize("method", ["random:6,seed=3", "visionzip:8"])
def test_patches_that_a_rival_keeps(method):
    from llava_skip import LlavaSkipForConditionalGeneration
    from llava_skip.reduction import ReductionConfig

    config = small_config(None)
    config.reduction = ReductionConfig.parse(method).to_dict()
    torch.manual_seed(3)
    model = LlavaSkipForConditionalGeneration(config).eval().model
    crops = crops_of(model)
    parts = image_parts(model, crops)
    with torch.no_grad():
        rows = model.encode_images(crops)[0]
        config.reduction = None
        every = model.encode_images(crops)[0]
    same = torch.cdist(every, rows).amin(dim=1) < 1e-4
    assert parts.retained == int(same.sum()) and 0 < parts.retained <= len(rows)
    kept = {place.box for place in parts.places[: parts.retained]}
    assert kept == {
        (4 * (n % 4), 4 * (n // 4), 4 * (n % 4) + 4, 4 * (n // 4) + 4) for n in same.nonzero().flatten().tolist()
    }
    assert parts.tokens.count(-1) == 16 - parts.retained


class Normalisation:
    image_mean, image_std = [0.5] * 3, [0.25] * 3


def test_pictures_show_the_parts():
    model = small_model(SKIP).model
    crops = crops_of(model)
    parts = image_parts(model, crops)
    image, scale = crops_image(crops, Normalisation)
    assert image.size == (448, 448) and scale == 28
    pixel = ((crops[0, :, 6, 9] * 0.25 + 0.5).clamp(0, 1) * 255).round().tolist()
    assert image.getpixel((9 * 28 + 3, 6 * 28 + 3)) == tuple(map(int, pixel))

    def corner(place, picture):
        return picture.getpixel((place.box[0] * 28, place.box[1] * 28))

    def middle(place, picture):
        return picture.getpixel((place.box[0] * 28 + 40, place.box[1] * 28 + 40))

    retained = draw_retained(image, scale, 16, parts)
    for number, place in enumerate(parts.places):
        assert (corner(place, retained) == OUTLINE) == (number < 5)
        assert (middle(place, retained) == middle(place, image)) == (number < 5)
    merges = draw_merges(image, scale, 16, parts)
    flat = draw_merges(image.point(lambda value: 0), scale, 16, parts)
    colours = {}
    for number, place in enumerate(parts.places):
        assert (corner(place, merges) == (255, 255, 255)) == (number >= 5 and parts.keeps[number])
        if number >= 5:
            colours.setdefault(parts.tokens[number], set()).add(middle(place, flat))
    assert len(colours) == 7 and all(len(own) == 1 for own in colours.values())
    assert len(set.union(*colours.values())) == 7
    heat, shares = draw_heat(image, scale, 16, parts, 1), parts.heat(1)
    assert [share > 0 for share in shares] == [number >= 5 for number in range(16)]
    red, _, blue = middle(parts.places[shares.index(max(shares))], heat)
    assert red > 200 and blue < 60
