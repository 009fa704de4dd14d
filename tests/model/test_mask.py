"""What is hidden changes nothing, what is packed equals what is apart, and padding never makes a NaN."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llm.model.mask import Places, self_mask

POSITIONS = ["rotary", "learned", "sinusoidal"]
DOCUMENTS = torch.tensor([[1] * 5 + [2] * 8 + [3] * 4 + [0] * 3, [1] * 20])
PLACES = torch.tensor([[*range(5), *range(8), *range(4), *range(3)], [*range(20)]])


def logits(model, *args, **kwargs):
    return model.logits(model(*args, **kwargs))


@pytest.fixture
def tokens():
    return torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(1))


def changed(tokens, where):
    return torch.where(where, (tokens + 7) % 50, tokens)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("n_kv_heads", [4, 1])
def test_the_future_is_hidden(build, tokens, position, n_kv_heads):
    model = build(position=position, n_kv_heads=n_kv_heads)
    later = torch.arange(20).expand(2, 20) >= 9
    before, after = logits(model, tokens), logits(model, changed(tokens, later))
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9], after[:, 9])


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_other_documents_and_padding_are_hidden(build, tokens, position, norm_position):
    model = build(position=position, norm_position=norm_position)
    before = logits(model, tokens, DOCUMENTS, PLACES)
    for document in (0, 1, 2, 3):
        own = document == DOCUMENTS
        after = logits(model, changed(tokens, own), DOCUMENTS, PLACES)
        others = ~own & (DOCUMENTS > 0)
        assert torch.equal(before[others], after[others])
        assert not torch.equal(before[own], after[own])


def test_within_a_document_the_past_is_seen_and_the_future_hidden(build, tokens):
    model = build()
    before = logits(model, tokens, DOCUMENTS, PLACES)
    seventh = torch.zeros_like(DOCUMENTS, dtype=torch.bool)
    seventh[0, 7] = True  # the third token of document 2
    after = logits(model, changed(tokens, seventh), DOCUMENTS, PLACES)
    differs = (before != after).any(-1)
    assert differs[0].nonzero().flatten().tolist() == [7, 8, 9, 10, 11, 12]
    assert not differs[1].any()


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_packed_equals_unpacked(build, tokens, position, n_kv_heads):
    """Logits and gradients of three documents in one row, and of each in a row of its own."""
    model = build(position=position, n_kv_heads=n_kv_heads, qk_norm=True)
    row, documents, places = tokens[:1], DOCUMENTS[:1], PLACES[:1]
    labels = row.roll(-1).masked_fill(documents == 0, -100)

    packed = logits(model, row, documents, places)
    F.cross_entropy(packed[0], labels[0], reduction="sum").backward()
    packed_gradients = [parameter.grad.clone() for parameter in model.parameters()]

    model.zero_grad()
    for document in (1, 2, 3):
        own = documents[0] == document
        alone = logits(model, row[:, own])
        torch.testing.assert_close(alone[0], packed[0, own], rtol=0, atol=1e-5)
        F.cross_entropy(alone[0], labels[0, own], reduction="sum").backward()
    for ours, expected in zip(packed_gradients, model.parameters(), strict=True):
        scale = expected.grad.abs().max().clamp(min=1)
        torch.testing.assert_close(ours / scale, expected.grad / scale, rtol=0, atol=1e-5)


def test_one_document_equals_none(build, tokens):
    model = build()
    torch.testing.assert_close(model(tokens, torch.ones_like(tokens)), model(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_makes_no_nan(build, tokens, dtype):
    model = build()
    documents = torch.zeros_like(tokens)
    documents[1, 4:9] = 1  # a row of padding only, and a row padded on both sides
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = logits(model, tokens, documents, PLACES).float()
    out[documents > 0].sum().backward()
    assert out.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=3), st.integers(0, 5))
def test_document_mask_is_its_definition(documents, n_past):
    keys = torch.tensor(documents)
    visible = self_mask(Places(6 - n_past, n_past, keys, keys.device), causal=True).visible
    assert visible.shape == (len(documents), 1, 6 - n_past, 6)
    for b, row in enumerate(documents):
        for t in range(n_past, 6):
            for s in range(6):
                assert visible[b, 0, t - n_past, s].item() == (s <= t and row[s] == row[t])


def test_causal_mask_uses_the_kernel_where_it_can():
    def mask(length, n_past, **options):
        return self_mask(Places(length, n_past, None, torch.device("cpu")), causal=True, **options)

    assert mask(5, 0) == (None, True, None, None)
    assert mask(1, 0) == (None, False, None, None)
    assert mask(1, 9) == (None, False, None, None)
    assert mask(5, 0, window=5) == (None, True, None, None)
    assert self_mask(Places(5, 0, None, torch.device("cpu")), causal=False) == (None, False, None, None)
    chunk = mask(2, 3)
    assert chunk.visible.tolist() == [[[[True, True, True, True, False], [True] * 5]]]
    assert not chunk.causal
