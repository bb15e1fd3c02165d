import torch

from llava_skip import SkipConfig
from llava_skip.routing import ImageTokens, add_to_tokens, align_right, make_route, skipped_tokens, take_tokens

SKIP = SkipConfig(2, 3)  # an image is r r s k k k s


def flags(text: str) -> torch.Tensor:
    return torch.tensor([[letter == "#" for letter in sample] for sample in text.split()])


def test_skipped_tokens_of_images_anywhere():
    is_image = flags("..#######....... .##############. ................")
    expected = flags(".....###........ ....###....###.. ................")
    assert torch.equal(skipped_tokens(is_image, SKIP), expected)


def test_route_leaves_out_padding_and_skipped_tokens():
    is_image, real = flags("#######... .........."), flags("########.. ..########")
    route = make_route(ImageTokens.of_forward(is_image, SKIP), real)
    expected = real & ~flags("...###.... ..........")
    assert route.ffn_tokens.tolist() == expected.flatten().nonzero().squeeze(1).tolist()
    assert torch.equal(route.kept, expected)


def test_route_is_empty_when_every_token_takes_the_ffn():
    nothing = flags("....")
    assert make_route(ImageTokens.of_forward(nothing, SKIP), None).ffn_tokens is None
    assert make_route(ImageTokens.of_forward(nothing, None), None).ffn_tokens is None


def test_dense_route_leaves_out_padding_only_and_forgets_nothing():
    route = make_route(ImageTokens.of_forward(flags("####.."), None), flags("#####."))
    assert route.ffn_tokens.tolist() == [0, 1, 2, 3, 4]
    assert route.kept is None


def test_take_and_add_are_a_pair():
    hidden = torch.randn(2, 3, 4)
    tokens = torch.tensor([0, 4, 5])
    taken = take_tokens(hidden, tokens)
    assert torch.equal(taken, torch.stack([hidden[0, 0], hidden[1, 1], hidden[1, 2]]))
    result = add_to_tokens(hidden, tokens, -taken)
    assert torch.equal(result.flatten(0, 1)[tokens], torch.zeros(3, 4))
    others = torch.tensor([1, 2, 3])
    assert torch.equal(result.flatten(0, 1)[others], hidden.flatten(0, 1)[others])


def test_align_right_packs_in_order():
    index, valid = align_right(flags("#.#.# .#... #####"))
    assert index[0, -3:].tolist() == [0, 2, 4]
    assert valid[0].tolist() == [False, False, True, True, True]
    assert index[1, -1].item() == 1
    assert index[2].tolist() == [0, 1, 2, 3, 4]
