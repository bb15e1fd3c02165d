"""The attention of the class token, by which patches are retained."""

import pytest
import torch
from torch import nn

from llava_skip.vision.clip import class_attention
from tests.support.small_models import small_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_class_attention_is_a_softmax_in_float32(dtype):
    """In half precision probabilities would be rounded to few values, and the choice among equal ones arbitrary."""
    layer = small_model().model.vision_tower.encoder.layers[1].to(dtype)
    hidden_states = torch.randn(2, 17, 16).to(dtype)
    attention, normed = layer.self_attn, layer.layer_norm1(hidden_states)
    found = class_attention(layer, hidden_states)
    assert found.dtype == torch.float32
    for head in range(attention.num_heads):
        width = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        query = attention.q_proj(normed[:, :1])[..., width] * attention.scale
        logits = query @ attention.k_proj(normed)[..., width].transpose(1, 2)
        expected = nn.functional.softmax(logits, dim=-1, dtype=torch.float32)[:, 0, 1:]
        torch.testing.assert_close(found[:, head], expected, atol=1e-6, rtol=1e-6)
