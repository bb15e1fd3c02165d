import pytest
import torch
from torch import Tensor, nn

from llava_skip import tokens as tokens_module
from llava_skip.tokens import SummaryLayer, merge_choices, merge_tokens, retained_first, retained_order
from tests.support.allocations import Allocations


def reference_merge(x: torch.Tensor, keep: int) -> torch.Tensor:
    """One image, token by token."""
    unit = x / x.norm(dim=-1, keepdim=True)
    similarity = unit @ unit.T
    order = (similarity.sum(1) - similarity.diagonal()).argsort(descending=True).tolist()
    merged, kept = order[: len(x) - keep], order[len(x) - keep :]
    groups = {k: [k] for k in kept}
    for token in merged:
        groups[max(kept, key=lambda k: similarity[token, k].item())].append(token)
    return torch.stack([x[groups[k]].mean(0) for k in kept])


@pytest.mark.parametrize(("total", "keep"), [(12, 5), (12, 11), (12, 1), (30, 4)])
def test_merge_equals_token_by_token(total, keep):
    x = torch.randn(3, total, 6)
    expected = torch.stack([reference_merge(sample, keep) for sample in x])
    assert torch.allclose(merge_tokens(x, keep), expected, atol=1e-5)


def test_merge_of_a_sample_does_not_depend_on_its_neighbours():
    x = torch.randn(4, 20, 6)
    assert torch.allclose(merge_tokens(x, 7)[2:3], merge_tokens(x[2:3], 7), atol=1e-6)


def test_merge_to_all_is_the_input_and_gradients_are_those_of_means():
    x = torch.randn(1, 9, 4, requires_grad=True)
    assert merge_tokens(x, 9) is x
    merge_tokens(x, 3).sum().backward()
    _, order, target = merge_choices(x, 3)
    sizes = 1 + torch.bincount(target[0], minlength=3)
    expected = torch.empty(9)
    expected[order[0, 6:]] = 1 / sizes
    expected[order[0, :6]] = (1 / sizes)[target[0]]
    assert torch.allclose(x.grad[0], expected[:, None].expand(9, 4), atol=1e-6)


def test_autocast_changes_no_choice():
    x = torch.randn(4, 90, 16)
    with torch.autocast("cpu", torch.bfloat16):
        choices = merge_choices(x, 30)
    assert all(map(torch.equal, choices, merge_choices(x, 30)))


def merge_with_a_map(x: Tensor, keep: int) -> Tensor:
    """All images at once, with a map of all tokens, and its gradients from autograd."""
    _, order, target = merge_choices(x, keep)
    merged, kept = x.gather(1, order.unsqueeze(-1).expand_as(x)).split([x.shape[1] - keep, keep], dim=1)
    assignment = nn.functional.one_hot(target, keep).transpose(1, 2).to(x.dtype)
    return (kept + assignment @ merged) / (1 + assignment.sum(dim=-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_equal_to_the_bit_to_one_of_all_images_at_once(dtype):
    x, grad = torch.randn(5, 30, 24).to(dtype), torch.randn(5, 12, 24).to(dtype)
    results = []
    for merge in (merge_with_a_map, merge_tokens):
        given = x.clone().requires_grad_()
        merged = merge(given, 12)
        merged.backward(grad)
        results.append((merged, given.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("trained", [False, True])
def test_memory_of_a_merge_does_not_grow_with_the_images(trained, monkeypatch):
    """Beside its result, the gradient and 20 bytes a token, what it needs is that of two images."""
    total, keep, width = 96, 24, 64
    monkeypatch.setattr(tokens_module, "MERGED_AT_ONCE", 2 * total * width * 4)
    beside = {}
    for images in (2, 16, 32):
        x = torch.randn(images, total, width, requires_grad=trained)
        with Allocations() as seen:
            merged = merge_tokens(x, keep)
            if trained:
                merged.backward(torch.ones_like(merged))
        results = merged.nbytes + (x.nbytes + merged.nbytes if trained else 0)  # the gradients of both
        beside[images] = seen.peak - results - 20 * images * total
    assert beside[16] < 1.1 * beside[2] and beside[32] < 1.1 * beside[2]


def test_a_merge_makes_no_map_of_whole_numbers():
    x = torch.randn(4, 96, 8)
    with Allocations() as seen:
        merge_tokens(x, 24)
    assert seen.largest == 4 * 72 * 24 * 4  # of its largest tensor: similarities, or the assignment in float32


def test_merge_survives_a_zero_token():
    x = torch.randn(1, 8, 4)
    x[0, 3] = 0
    assert merge_tokens(x, 3).isfinite().all()


def test_tokens_of_equal_centrality_keep_their_order():
    kinds = torch.arange(60) % 5 // 3  # 36 tokens of one kind, 24 of another; exact ties within a kind
    _, order, _ = merge_choices(nn.functional.one_hot(kinds).float()[None], keep=30)
    expected = torch.cat([(kinds == kind).nonzero().flatten() for kind in (0, 1)])
    assert order[0].tolist() == expected.tolist()


@pytest.mark.parametrize("keep", [0, 9])
def test_merge_refuses_impossible_numbers(keep):
    with pytest.raises(ValueError, match=f"8 tokens to {keep}"):
        merge_tokens(torch.randn(1, 8, 4), keep)


def test_retained_keep_the_order_of_the_image():
    tokens = torch.arange(6.0).reshape(1, 6, 1)
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.0, 0.3]])
    assert retained_first(tokens, scores, 2).flatten().tolist() == [1, 3, 0, 2, 4, 5]
    many = torch.rand(1, 64)
    chosen = sorted(many[0].topk(20).indices.tolist())
    assert retained_order(many, 20)[0].tolist() == chosen + [i for i in range(64) if i not in chosen]


def test_summary_is_a_weighted_mean_of_the_raw_tokens():
    layer = SummaryLayer(8)
    tokens = torch.randn(2, 5, 8)
    weights = layer.weights(tokens)
    assert torch.allclose(weights.sum(1), torch.ones(2, 1))
    assert torch.allclose(
        layer(tokens)[1, 0], sum(w * t for w, t in zip(weights[1], tokens[1], strict=True)), atol=1e-6
    )
    assert weights.std() > 0
