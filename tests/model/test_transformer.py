"""The network as a whole: its cache, its counts, its dropout, its precision and its complaints."""

import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from llm.model import Cache, Transformer

SHAPES = [
    {},
    {"n_kv_heads": 2, "activation": "gelu", "tie_embeddings": True, "position": "learned"},
    {"n_kv_heads": 1, "head_dim": 10, "ffn_dim": 28, "qk_norm": True, "bias": True, "norm_position": "post"},
]


@pytest.fixture
def tokens():
    return torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("position", ["rotary", "learned", "sinusoidal"])
@pytest.mark.parametrize("n_kv_heads", [4, 1])
@pytest.mark.parametrize("chunks", [[12], [5] + [1] * 7, [1] * 12, [4, 3, 5]])
def test_cache_equals_no_cache(build, tokens, position, n_kv_heads, chunks):
    model = build(position=position, n_kv_heads=n_kv_heads)
    cache = Cache(n_layers=2, max_length=16)
    parts = [model(chunk, cache=cache) for chunk in tokens.split(chunks, dim=1)]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=0, atol=1e-5)


def test_cache_with_documents(build, tokens):
    model = build()
    documents = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 12, [1] * 6 + [2] * 6])
    positions = torch.tensor([[0, 0, *range(10)], [*range(12)], [*range(6), *range(6)]])
    cache = Cache(n_layers=2, max_length=12)
    parts = [
        model(tokens[:, part], documents[:, part], positions[:, part], cache)
        for part in (slice(0, 4), slice(4, 5), slice(5, 9), slice(9, 12))
    ]
    expected = model(tokens, documents, positions)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5)


def test_tied_and_untied_head(build, tokens):
    tied = build(tie_embeddings=True)
    hidden = tied(tokens)
    assert torch.equal(tied.logits(hidden), hidden @ tied.embed.weight.T)
    assert tied.n_parameters() == build().n_parameters() - 50 * 32


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_the_last_norm(build, tokens, norm):
    """Every hidden state leaves normalised, pre-norm or post-norm."""
    for norm_position in ("pre", "post"):
        model = build(norm=norm, norm_position=norm_position)
        last = model.decoder.norm if norm_position == "pre" else model.blocks[-1].feed_forward_norm
        with torch.no_grad():
            last.weight.fill_(1.0)
        torch.testing.assert_close(model(tokens).square().mean(-1), torch.ones(3, 12), rtol=0, atol=1e-3)


def test_sinusoidal_positions(build, tokens):
    """Vaswani et al. 2017: embedding · sqrt(D), plus sin and cos of t / 10000^(2i/D), sines first."""
    model = build(position="sinusoidal")
    hidden = model.decoder.position(torch.zeros(1, 12, 32), torch.arange(12))
    for t in (0, 5):
        for i in (0, 3, 15):
            angle = torch.tensor(t / 10000 ** (2 * i / 32))
            torch.testing.assert_close(hidden[0, t, [i, 16 + i]], torch.stack((angle.sin(), angle.cos())))
    torch.testing.assert_close(
        model.decoder.position(torch.ones(1, 1, 32), torch.tensor([0]))[0, 0, 0], torch.tensor(32**0.5)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_matmul_flops(config, shape):
    model = Transformer(config(**shape))
    tokens = torch.randint(50, (3, 10))
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        model.logits(model(tokens))
    assert model.matmul_flops(3, 10) == forward.get_total_flops()
    with FlopCounterMode(display=False) as training, sdpa_kernel(SDPBackend.MATH):
        model.logits(model(tokens)).sum().backward()
    assert 3 * model.matmul_flops(3, 10) == training.get_total_flops()


def test_flops_per_token(config):
    """6N + 12·L·H·K·T: what is only looked up (untied embedding, learned positions) is not in N."""
    for position, table in (("rotary", 0), ("learned", 24 * 32)):
        for tied, lookup in ((True, 0), (False, 50 * 32)):
            model = Transformer(config(position=position, tie_embeddings=tied))
            n = sum(p.numel() for p in model.parameters()) - table - lookup
            assert model.flops_per_token(20) == 6 * n + 12 * 2 * 32 * 20
            model.requires_grad_(False)
            assert model.flops_per_token(20) == 4 * n + 12 * 2 * 32 * 20


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_dropout(build, tokens, norm_position):
    still, dropping = (build(dropout=p, norm_position=norm_position) for p in (0.0, 0.3))
    assert torch.equal(still.train()(tokens), still.eval()(tokens))
    assert not torch.equal(dropping.train()(tokens), dropping(tokens))
    assert torch.equal(dropping.eval()(tokens), still(tokens))
    torch.manual_seed(5)
    first = dropping.train()(tokens)
    torch.manual_seed(5)
    assert torch.equal(dropping(tokens), first)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [*SHAPES, {"norm": "layer", "qk_norm": True}, {"position": "sinusoidal"}])
def test_bf16(build, tokens, shape):
    """Under autocast and cast whole, forward and backward stay near fp32; no kernel complains of mixed dtypes."""
    model = build(**shape)
    documents = torch.tensor([[1] * 5 + [2] * 7]).expand(3, 12)
    expected = model(tokens, documents).detach()
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model.logits(model(tokens, documents))
        hidden = model(tokens, documents)
    assert autocast.dtype == torch.bfloat16
    autocast.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    cast = model.bfloat16()(tokens, documents)
    assert cast.dtype == torch.bfloat16
    for ours in (hidden, cast):
        error = (ours.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 0.03


def test_nothing_waits_for_a_number(build, tokens):
    """No `.item()` in forward or backward: on a GPU each would stall the host."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    model = build(position="learned", dropout=0.1, qk_norm=True)
    with Watch():
        model.logits(model(tokens, torch.ones_like(tokens), torch.arange(12))).sum().backward()
        with pytest.raises(AssertionError):
            tokens.sum().item()


def test_compiles_without_a_graph_break(build, tokens):
    model = build(n_kv_heads=2, qk_norm=True, dropout=0.1, tie_embeddings=True).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    documents = torch.tensor([[1] * 5 + [2] * 7]).expand(3, 12)
    assert torch.equal(compiled(tokens), model(tokens))
    assert torch.equal(compiled(tokens, documents), model(tokens, documents))


def refusal(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_refuses_an_unknown_vocabulary(config):
    with refusal(
        "model.vocab_size is null: it must be known before a network is built; "
        "set it, or take it from the tokenizer with dataclasses.replace(config, vocab_size=…)"
    ):
        Transformer(config(vocab_size=None))


def test_refuses_more_tokens_than_learned_positions(build):
    tokens = torch.zeros(1, 25, dtype=torch.long)
    with refusal(
        "25 tokens are more than model.max_length = 24 learned positions; "
        "cut the text, or raise model.max_length and train"
    ):
        build(position="learned")(tokens)
    for endless in ("rotary", "sinusoidal"):
        assert build(position=endless)(tokens).isfinite().all()


def test_refuses_a_misused_cache(build, tokens):
    model, cache = build(), Cache(n_layers=2, max_length=14)
    model(tokens, cache=cache)
    with refusal("24 tokens are more than the cache holds (14); build a longer Cache"):
        model(tokens, cache=cache)
    with refusal("documents must be given for every forward with one cache, or for none"):
        model(tokens[:, :1], torch.ones(3, 1, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("shape", [{}, {"tie_embeddings": True}, {"head_bias": True}])
def test_a_padded_vocabulary_changes_nothing(build, shape):
    """Scores, loss and gradients of a product with 64 columns are those of the 50 that there are."""
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))
    found = []
    for multiple in (1, 64):
        model = build(**shape)
        model.head.multiple = multiple
        scores = model.logits(model(tokens))
        assert scores.shape == (2, 12, 50)
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), tokens.flatten())
        loss.backward()
        found.append([scores, loss, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_the_product_of_the_head_is_as_wide_as_kernels_like(build):
    class Widths(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.nn.functional.linear:
                widths.append(args[1].shape[0])
            return function(*args, **(kwargs or {}))

    model, widths = build(), []
    model.head.multiple = 64
    with Widths():
        model.logits(torch.randn(2, 32))
        model.eval().logits(torch.randn(2, 32))
    assert widths == [64, 50], "in generation a copy of the weight would cost more than it gains"
