"""Each selecting rival against a plain reference, on random tensors at the paper's grid and in a model."""

import numpy as np
import pytest
import torch

from llava_skip.reduction import ReductionConfig
from llava_skip.reduction.divprune import most_diverse
from llava_skip.reduction.downsample import Downsample
from llava_skip.reduction.fastervlm import most_attended
from llava_skip.reduction.grid import lattice
from llava_skip.reduction.hiprune import anchors_and_registers
from llava_skip.reduction.prumerge import kept_patches, merged, one_head
from llava_skip.reduction.random_rows import lots
from llava_skip.reduction.visionzip import shares, zipped
from llava_skip.reduction.vispruner import important_and_diverse
from llava_skip.vision.clip import resize_positions
from tests.support import rival_references as plain
from tests.support.small_models import mixed_samples, small_model

IMAGES, HEADS, PATCHES, WIDTH = 2, 3, 576, 12


@pytest.fixture(scope="module")
def tower():
    """What a tower of 24 x 24 patches could give: two layers' attention, features and keys."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(IMAGES, *shape, generator=generator)

    tokens = PATCHES + 1
    return {
        "middle": (2 * draw(HEADS, tokens, tokens)).softmax(-1),
        "last": (2 * draw(HEADS, tokens, tokens)).softmax(-1),
        "features": draw(tokens, WIDTH),
        "keys": draw(tokens, WIDTH),
        "query": draw(1, WIDTH),
    }


def arrays(tower, index):
    return {name: tensor[index].double().numpy() for name, tensor in tower.items()}


def same(found, expected):
    np.testing.assert_allclose(found.double().numpy(), np.stack(expected), atol=1e-5, rtol=1e-5)


def each(rule):
    return [rule(index) for index in range(IMAGES)]


@pytest.mark.parametrize("count", [192])
def test_choices_at_the_papers_grid(tower, count):
    scores, patches = tower["last"][:, :, 0, 1:], tower["features"][:, 1:]
    one = [arrays(tower, index) for index in range(IMAGES)]
    assert most_attended(scores, count).tolist() == each(lambda i: plain.fastervlm(one[i]["last"], count))
    found = anchors_and_registers(
        tower["middle"].mean(dim=(1, 2))[:, 1:], tower["last"].mean(dim=(1, 2))[:, 1:], count, round(count * 0.1 / 5)
    )
    assert found.tolist() == each(lambda i: plain.hiprune(one[i]["middle"], one[i]["last"], count, 0.1))
    assert most_diverse(patches, count).tolist() == each(lambda i: plain.divprune(one[i]["features"][1:], count))


@pytest.mark.parametrize("count, ratio", [(64, 0.75), (128, 0.5), (16, 1.0)])
def test_vispruner_at_the_papers_grid(tower, count, ratio):
    found = important_and_diverse(tower["last"][:, :, 0, 1:], tower["features"][:, 1:], count, ratio)
    one = [arrays(tower, index) for index in range(IMAGES)]
    assert found.tolist() == each(lambda i: plain.vispruner(one[i]["last"], one[i]["features"], count, ratio))


def test_visionzip_has_the_papers_shares():
    assert [shares(count) for count in (192, 128, 64)] == [(162, 30), (108, 20), (54, 10)]
    assert [shares(count) for count in (32, 1)] == [(27, 5), (1, 0)]


@pytest.mark.parametrize("dominant, contextual", [(54, 10), (162, 30), (5, 0)])
def test_visionzip_at_the_papers_grid(tower, dominant, contextual):
    keys = tower["keys"].unflatten(-1, (HEADS, -1)).mean(dim=2)
    found = zipped(tower["features"], tower["last"][:, :, 0, 1:], keys, dominant, contextual)
    one = [arrays(tower, index) for index in range(IMAGES)]
    if not contextual:
        kept = each(lambda i: [0, *(1 + p for p in plain.fastervlm(one[i]["last"], dominant - 1))])
        assert torch.equal(found, torch.stack([f[k] for f, k in zip(tower["features"], kept, strict=True)]))
        return
    split = dominant, contextual
    same(found, each(lambda i: plain.visionzip(one[i]["last"], one[i]["features"], one[i]["keys"], HEADS, split)))


def test_visionzip_with_every_row_has_every_feature(tower):
    features = tower["features"]
    keys = tower["keys"].unflatten(-1, (HEADS, -1)).mean(dim=2)
    found = zipped(features, tower["last"][:, :, 0, 1:], keys, *shares(PATCHES + 1))
    for rows, own in zip(found, features, strict=True):
        assert torch.equal(rows[rows[:, 0].argsort()], own[own[:, 0].argsort()])


@pytest.mark.parametrize("count", [64, 2, 1])
def test_prumerge_at_the_papers_grid(tower, count):
    attention = one_head(tower["query"], tower["keys"])
    kept = kept_patches(attention, count - 1)
    found = merged(tower["features"][:, 1:], attention, tower["keys"][:, 1:], kept, 32)
    one = [arrays(tower, index) for index in range(IMAGES)]
    same(
        found,
        each(lambda i: plain.prumerge_plus(one[i]["query"][0], one[i]["keys"], one[i]["features"], count)),
    )


def test_divprune_chooses_no_token_twice():
    assert most_diverse(torch.ones(2, 9, 4), 9).tolist() == [list(range(9))] * 2


@pytest.mark.parametrize("side", [4, 6, 24])
def test_a_lattice_is_even_for_every_number(side):
    for count in range(1, side * side + 1):
        places = lattice(count, side, torch.device("cpu")).tolist()
        assert len(set(places)) == count and places == sorted(places) and 0 <= places[0] and places[-1] < side * side
    assert lattice(4, 4, torch.device("cpu")).tolist() == [5, 7, 13, 15]
    assert lattice(side * side, side, torch.device("cpu")).tolist() == list(range(side * side))


def test_lots_follow_from_the_crop_and_the_seed():
    pixels = torch.randn(3, 3, 16, 16)
    numbers = lots(pixels, 400, 0)
    assert torch.equal(lots(pixels[1:2], 400, 0)[0], numbers[1])
    others = [lots(pixels, 400, seed) for seed in (1, 3, 2**31)]
    assert all(not torch.equal(lots_of_seed, numbers) for lots_of_seed in others)
    assert len(numbers.unique()) == 1200
    # Every bit is set in half of the numbers: 4 standard deviations of a binomial.
    bits = torch.stack([(numbers >> bit) & 1 for bit in range(64)]).double().mean(dim=(1, 2))
    assert (bits - 0.5).abs().max() < 4 * 0.5 / 1200**0.5


# --- in a model: the right layers are read


@pytest.fixture(scope="module")
def model():
    made = small_model(architecture="llava")
    made.set_attn_implementation("eager")
    return made


@pytest.fixture(scope="module")
def seen(model):
    """Pixels of two images, and what transformers' tower says of them, with the keys and queries of its layers."""
    pixels = mixed_samples(model)[1].pixel_values
    tower, caught, hooks = model.model.vision_tower, {}, []
    for index, layer in enumerate(tower.encoder.layers):
        for name in ("q_proj", "k_proj"):
            module = getattr(layer.self_attn, name)
            hooks.append(
                module.register_forward_hook(lambda *given, key=(name, index): caught.__setitem__(key, given[2]))
            )
    with torch.no_grad():
        outputs = tower.outputs(pixels, output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return pixels, outputs, caught


@torch.no_grad()
def rows(model, pixels, text):
    model.set_reduction(ReductionConfig.parse(text))
    found = model.model.encode_images(pixels)
    model.set_reduction(None)
    return found


def expected_rows(text, attentions, hidden, caught, index):
    """Rows before the projector [T, C] of one image, by the references."""
    last, features = attentions[-2][index].double().numpy(), hidden[-2][index].double().numpy()
    middle = attentions[0][index].double().numpy()  # the 9th of 24 layers is the 1st of 3
    key = {layer: caught["k_proj", layer][index].double().numpy() for layer in (1, 2)}
    name, count = text.partition(",")[0].split(":")
    patches, count = features[1:], int(count)
    if name == "visionzip":
        return plain.visionzip(last, features, key[1], 2, shares(count))
    if name == "prumerge+":
        return plain.prumerge_plus(caught["q_proj", 2][index, 0].double().numpy(), key[2], features, count)
    if name == "vispruner":
        return patches[plain.vispruner(last, features, count, 0.5)]
    if name == "hiprune":
        return patches[plain.hiprune(middle, last, count, 1.0)]
    return patches[plain.fastervlm(last, count)]


@pytest.mark.parametrize(
    "text", ["fastervlm:6", "visionzip:8", "vispruner:6", "hiprune:6,alpha=1.0", "prumerge+:7", "prumerge+:17"]
)
@torch.no_grad()
def test_the_model_reads_the_layers_that_the_rule_names(model, seen, text):
    pixels, outputs, caught = seen
    found = rows(model, pixels, text)
    for index in range(len(pixels)):
        expected = expected_rows(text, outputs.attentions, outputs.hidden_states, caught, index)
        projected = model.model.multi_modal_projector(torch.tensor(expected, dtype=torch.float32)[None])[0]
        torch.testing.assert_close(found[index], projected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_divprune_reads_the_projected_tokens(model, seen):
    dense = model.model.encode_images(seen[0])
    found = rows(model, seen[0], "divprune:5")
    for index, tokens in enumerate(dense):
        assert torch.equal(found[index], tokens[plain.divprune(tokens.double().numpy(), 5)])


@torch.no_grad()
def test_downsample_is_a_tower_of_a_smaller_picture(model, seen):
    """As the same model with a tower of 2 x 2 patches, whose images and positions were resized before."""
    pixels = seen[0]
    smaller = small_model(architecture="llava")
    weights = model.state_dict()
    name = "model.vision_tower.embeddings.position_embedding.weight"
    smaller.config.vision_config.image_size = 8
    other = type(smaller)(smaller.config).eval()
    other.load_state_dict(weights | {name: resize_positions(weights[name], 4)})
    resized = torch.nn.functional.interpolate(pixels, size=(8, 8), mode="bicubic", antialias=True)
    for text in ("downsample:4", "downsample:8"):
        torch.testing.assert_close(rows(model, pixels, text), other.model.encode_images(resized), atol=1e-5, rtol=1e-5)
    assert Downsample().rows(ReductionConfig.parse("downsample:64"), 576) == 64
    assert Downsample().rows(ReductionConfig.parse("downsample:128"), 576) == 121


@torch.no_grad()
def test_crops_are_ranked_each_by_itself():
    model = small_model(architecture="llava-hd")
    sample = mixed_samples(model)[0]
    counts = sample.crop_counts
    for text in ("fastervlm:4", "random:4", "divprune:4"):
        model.set_reduction(ReductionConfig.parse(text))
        together = model.model.encode_images(sample.pixel_values, counts)[0]
        alone = [
            model.model.front_end.crop_tokens(
                model.model.vision_tower, model.model.multi_modal_projector, crop[None], model.config
            )[0]
            for crop in sample.pixel_values
        ]
        torch.testing.assert_close(together, torch.cat(alone))
