"""Attention and rotation against formulas written out."""

import math

import pytest
import torch

from llm.model.attention import Attention
from llm.model.mask import Places, self_mask
from llm.model.position import build_rotation, rotate


def naive_attention(attention, hidden, visible):
    """One query, one head at a time, in double precision."""
    x, k = hidden.double(), attention.head_dim
    query, key, value = (
        (x @ layer.weight.double().T).unflatten(-1, (-1, k))
        for layer in (attention.query, attention.key, attention.value)
    )
    n_heads, group = query.shape[2], query.shape[2] // key.shape[2]
    context = torch.zeros_like(query)
    for b in range(x.shape[0]):
        for h in range(n_heads):
            for t in range(x.shape[1]):
                seen = visible[b, t].nonzero().flatten()
                scores = key[b, seen, h // group] @ query[b, t, h] / math.sqrt(k)
                context[b, t, h] = scores.softmax(0) @ value[b, seen, h // group]
    return (context.flatten(-2) @ attention.out.weight.double().T).float()


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("documents", [None, [[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 3, 3]]])
def test_against_the_formula(config, n_kv_heads, documents):
    torch.manual_seed(0)
    attention = Attention(config(n_kv_heads=n_kv_heads, head_dim=6))
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    hidden = torch.randn(2, 6, 32)
    if documents is None:
        mask, visible = (
            self_mask(Places(6, 0, None, hidden.device), causal=True),
            torch.ones(2, 6, 6, dtype=torch.bool).tril(),
        )
    else:
        mask = self_mask(Places(6, 0, torch.tensor(documents), hidden.device), causal=True)
        visible = mask.visible.squeeze(1)
    expected = naive_attention(attention, hidden, visible)
    torch.testing.assert_close(attention(hidden, mask), expected, rtol=1e-4, atol=1e-4)


def test_grouped_equals_repeated_heads(config):
    """Grouped-query attention is multi-head attention whose key and value heads repeat."""
    torch.manual_seed(0)
    grouped, full = Attention(config(n_kv_heads=2)), Attention(config())
    weights = grouped.state_dict()
    for name in ("key.weight", "value.weight"):
        weights[name] = weights[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    hidden = torch.randn(2, 6, 32)
    mask = self_mask(Places(6, 0, None, hidden.device), causal=True)
    torch.testing.assert_close(grouped(hidden, mask), full(hidden, mask), rtol=0, atol=1e-6)


def test_rotation_is_a_product_of_complex_numbers():
    torch.manual_seed(0)
    heads = torch.randn(2, 5, 3, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1], [3, 900, 31, 7, 4000]])
    pairs = torch.complex(heads[..., :4].double(), heads[..., 4:].double())
    angles = positions.double()[..., None, None] * torch.tensor(
        [100.0 ** (-i / 4) for i in range(4)], dtype=torch.double
    )
    expected = torch.view_as_real(pairs * torch.exp(1j * angles))
    expected = torch.cat((expected[..., 0], expected[..., 1]), dim=-1).float()
    torch.testing.assert_close(rotate(heads, build_rotation(positions, 8, 100.0)), expected, rtol=0, atol=5e-4)


def test_only_distances_matter_to_rotary(build):
    model = build(position="rotary", qk_norm=True)
    tokens = torch.randint(50, (2, 20))
    near, far = model(tokens), model(tokens, positions=torch.arange(20) + 4000)
    torch.testing.assert_close(near, far, rtol=0, atol=2e-3)


def test_angles_stay_fp32_in_bf16():
    """Neither autocast nor a cast of the module may round angles: in bf16, positions 4000 and 4001 are the same."""
    positions = torch.arange(4000, 4010)
    with torch.autocast("cpu", torch.bfloat16):
        rotation = build_rotation(positions, 8, 10000.0)
    assert all(part.dtype == torch.float32 for part in rotation)
    assert all(torch.equal(*pair) for pair in zip(rotation, build_rotation(positions, 8, 10000.0), strict=True))
    assert rotate(torch.randn(1, 10, 2, 8).bfloat16(), rotation).dtype == torch.bfloat16


def test_attention_weights_are_dropped_in_training_only(config):
    torch.manual_seed(0)
    attention = Attention(config(dropout=0.5))
    hidden, mask = torch.randn(2, 6, 32), self_mask(Places(6, 0, None, torch.device("cpu")), causal=True)
    assert not torch.equal(attention(hidden, mask), attention(hidden, mask))
    attention.eval()
    assert torch.equal(attention(hidden, mask), attention(hidden, mask))
