"""torch.compile: one graph each for a training forward and a prefill, and one for all decode steps.

The backend runs the traced operators as they are: what is compiled, not what a compiler makes of it.
"""

import pytest
import torch

from llava_skip.counts import count_batch
from tests.support.small_models import IMAGE_TOKEN_ID, batch_of, mixed_samples, small_model


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled(model, **options):
    return torch.compile(model, backend="eager", fullgraph=True, **options)


def test_a_training_forward_of_a_counted_batch_is_one_graph():
    model = small_model().train()
    inputs = batch_of(mixed_samples(model), "right")
    real = inputs["attention_mask"].bool()
    inputs["labels"] = inputs["input_ids"].masked_fill((inputs["input_ids"] >= IMAGE_TOKEN_ID) | ~real, -100)
    inputs["counts"] = count_batch(model.config, inputs)
    loss = compiled(model)(**inputs).loss
    assert num_graphs() == 1
    torch.testing.assert_close(loss, model(**inputs).loss)


@torch.no_grad()
def test_a_prefill_is_one_graph_and_so_are_all_decode_steps():
    model = small_model()
    inputs = batch_of(mixed_samples(model), "left")
    expected = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    ).logits
    outputs = compiled(model)(**inputs, counts=count_batch(model.config, inputs), use_cache=True, logits_to_keep=1)
    assert num_graphs() == 1
    torch.testing.assert_close(outputs.logits[:, -1], expected[0])
    decode, cache, mask = compiled(model, dynamic=True), outputs.past_key_values, inputs["attention_mask"]
    for before, after in zip(expected, expected[1:], strict=False):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = decode(input_ids=before.argmax(-1)[:, None], attention_mask=mask, past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(logits, after, atol=1e-5, rtol=1e-5)
    assert num_graphs() == 2
