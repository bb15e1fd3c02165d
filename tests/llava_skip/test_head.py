"""A loss of many supervised tokens, whose logits are made a few tokens at a time."""

import pytest
import torch

from llava_skip import head as head_module
from llava_skip.head import Head, summed_loss
from tests.support.allocations import Allocations
from tests.support.small_models import batch_of, mixed_samples, small_model

VOCABULARY, WIDTH = 200, 16


@pytest.fixture
def few_rows(monkeypatch):
    """Logits of 8 tokens at a time."""
    monkeypatch.setattr(head_module, "LOGITS_AT_ONCE", 8 * VOCABULARY * 4)


def of_all_rows(head, states, targets):
    return torch.nn.functional.cross_entropy(head(states).float(), targets, reduction="sum")


def results(loss_of, rows, dtype, frozen=(), scale=3.0):
    """Loss, and gradients of the states and of the head."""
    torch.manual_seed(rows)
    head = Head(WIDTH, VOCABULARY, bias=False).to(dtype)
    states, targets = torch.randn(rows, WIDTH).mul(3).to(dtype), torch.randint(VOCABULARY, (rows,))
    states.requires_grad_("states" not in frozen)
    head.weight.requires_grad_("head" not in frozen)
    loss = loss_of(head, states, targets)
    (loss / scale).backward()
    return [loss.detach(), states.grad, head.weight.grad]


@pytest.mark.parametrize("rows", [9, 16, 61])
@pytest.mark.parametrize("frozen", [(), ("head",), ("states",)])
def test_a_loss_in_parts_equals_that_of_all_logits(few_rows, rows, frozen):
    for found, expected in zip(
        *(results(f, rows, torch.float32, frozen) for f in (summed_loss, of_all_rows)), strict=True
    ):
        assert (found is None) == (expected is None)
        if expected is not None:
            assert found.dtype == expected.dtype
            assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_a_loss_in_parts_is_near_it_in_bfloat16(few_rows):
    both = [results(loss_of, 61, torch.bfloat16) for loss_of in (summed_loss, of_all_rows)]
    for found, expected in zip(*both, strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).float().norm() < 0.01 * expected.float().norm()


def test_a_gradient_whose_sum_is_beyond_float16_is_finite(few_rows):
    """400 of each of 512 tokens with one target; their mean is what a step takes."""
    head = Head(WIDTH, VOCABULARY, bias=False).half()
    torch.nn.init.zeros_(head.weight)
    (summed_loss(head, torch.full((512, WIDTH), 400.0).half(), torch.zeros(512, dtype=torch.long)) / 512).backward()
    assert torch.allclose(head.weight.grad[0].float(), torch.tensor(400 * (1 / VOCABULARY - 1)), rtol=2e-3)


def test_few_rows_take_one_product_as_before(few_rows):
    both = [results(loss_of, 8, torch.float32) for loss_of in (summed_loss, of_all_rows)]
    assert all(torch.equal(*pair) for pair in zip(*both, strict=True))


@pytest.mark.parametrize("trains", [True, False])
def test_memory_of_the_loss_does_not_grow_with_the_logits(few_rows, trains):
    """Beside the gradients of states and head, it is that of one part."""
    head, beside = Head(WIDTH, VOCABULARY, bias=False), {}
    for rows in (16, 128, 512):
        states, targets = torch.randn(rows, WIDTH, requires_grad=trains), torch.randint(VOCABULARY, (rows,))
        with Allocations() as seen, torch.set_grad_enabled(trains):
            loss = summed_loss(head, states, targets)
            if trains:
                loss.backward()
        beside[rows] = seen.peak - (2 * states.nbytes if trains else 0)  # the loss keeps one, its backward scales it
    assert max(beside.values()) < 1.1 * beside[16]
    assert beside[16] < 8 * VOCABULARY * 4 * 1.2 + (3 * head.weight.nbytes if trains else 0)


def test_a_model_learns_alike_whatever_number_of_rows(monkeypatch):
    losses, gradients, calls = [], [], []
    for at_once in (head_module.LOGITS_AT_ONCE, 3 * 100 * 4):
        monkeypatch.setattr(head_module, "LOGITS_AT_ONCE", at_once)
        model = small_model().train()
        model.lm_head.register_forward_hook(lambda *_: calls.append(1))
        inputs = batch_of(mixed_samples(model), "right")
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert calls == [1, 1]  # ZeRO-3 needs as many on every rank
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name
