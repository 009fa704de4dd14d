"""Encoders, decoders and encoder-decoders: what is packed equals what is apart, and nothing leaks between documents."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from llm.model import Cache, Source, Transformer
from llm.model import mask as mask_module
from llm.model.mask import Places, block_mask, cross_mask, self_mask
from llm.model.position import RelativePosition, build_rotation

BERT = {
    "family": "encoder", "position": "learned", "n_segments": 2, "norm": "layer", "norm_position": "post",
    "embed_norm": True, "activation": "gelu", "bias": True, "tie_embeddings": True, "head_bias": True,
    "next_sentence": True, "initialisation": "bert",
}  # fmt: skip
MODERNBERT = {
    "family": "encoder", "n_layers": 4, "window": 4, "global_every": 3, "rope_theta": 160000.0,
    "local_rope_theta": 10000.0, "norm": "layer", "embed_norm": True, "activation": "geglu", "tie_embeddings": True,
    "head_bias": True,
}  # fmt: skip
T5 = {
    "family": "encoder_decoder", "position": "relative", "relative_buckets": 8, "relative_distance": 10,
    "activation": "relu", "scale_attention": False, "scale_logits": True,
    "tie_embeddings": True, "initialisation": "t5",
}  # fmt: skip
VASWANI = {
    "family": "encoder_decoder", "n_decoder_layers": 1, "position": "sinusoidal", "norm": "layer", "bias": True,
    "norm_position": "post", "activation": "relu", "n_kv_heads": 2, "initialisation": "vaswani",
}  # fmt: skip
MISTRAL = {"window": 3, "n_kv_heads": 2, "bias": "qkv"}
BERT_TO_RANDOM = {
    **{key: value for key, value in BERT.items() if key != "next_sentence"},
    "family": "encoder_decoder", "n_decoder_layers": 1,
}  # fmt: skip
SHAPES = {
    "bert to random": BERT_TO_RANDOM,
    "bert": BERT,
    "modernbert": MODERNBERT,
    "t5": T5,
    "vaswani": VASWANI,
    "mistral": MISTRAL,
}
ENCODERS = ["bert", "modernbert"]

# Row 0: three documents and padding, row 1: two. Sources have other lengths.
LENGTHS = [[5, 8, 4], [9, 3]]
SOURCE_LENGTHS = [[6, 2, 7], [4, 12]]
WIDTH = 20


def laid_out(lengths):
    """Documents and positions [B, WIDTH] of rows of pieces."""
    documents, positions = torch.zeros(len(lengths), WIDTH, dtype=torch.long), torch.zeros(len(lengths), WIDTH).long()
    for row, pieces in enumerate(lengths):
        at = 0
        for number, length in enumerate(pieces, 1):
            documents[row, at : at + length] = number
            positions[row, at : at + length] = torch.arange(length)
            at += length
    return documents, positions


def packed_batch(family):
    draw = torch.Generator().manual_seed(1)
    documents, positions = laid_out(LENGTHS)
    batch = {"tokens": torch.randint(50, (2, WIDTH), generator=draw), "documents": documents, "positions": positions}
    if family == "encoder":
        batch["segments"] = torch.randint(2, (2, WIDTH), generator=draw)
    if family == "encoder_decoder":
        batch["source"] = Source(torch.randint(50, (2, WIDTH), generator=draw), *laid_out(SOURCE_LENGTHS))
    return batch


def alone(batch, row, number):
    """One document of a packed batch, by itself."""
    own = batch["documents"][row] == number
    part = {"tokens": batch["tokens"][row, own][None]}
    if "segments" in batch:
        part["segments"] = batch["segments"][row, own][None]
    if "source" in batch:
        source = batch["source"]
        part["source"] = Source(source.tokens[row, source.documents[row] == number][None])
    return part, own


def logits(model, **batch):
    if model.config.n_segments == 0:
        batch.pop("segments", None)
    return model.logits(model(**batch))


@pytest.mark.parametrize("way", ["dense", "runs"])
@pytest.mark.parametrize("name", SHAPES)
def test_packed_equals_unpacked(build, name, way, monkeypatch):
    """Logits and gradients."""
    monkeypatch.setattr(mask_module, "LONG", 0)
    model = build(**SHAPES[name])
    model.mask_way = way
    batch = packed_batch(model.config.family)
    packed = logits(model, **batch)
    weight = torch.randn(packed.shape, generator=torch.Generator().manual_seed(2))
    (packed * weight)[batch["documents"] > 0].sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, pieces in enumerate(LENGTHS):
        for number in range(1, len(pieces) + 1):
            part, own = alone(batch, row, number)
            single = logits(model, **part)
            torch.testing.assert_close(single[0], packed[row, own], rtol=0, atol=1e-5)
            (single[0] * weight[row, own]).sum().backward()
    apart = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(together) == set(apart)
    for key, gradient in together.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(
            gradient / scale, apart[key] / scale, rtol=0, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("way", ["dense", "runs"])
@pytest.mark.parametrize("name", SHAPES)
def test_nothing_leaks_between_documents(build, name, way, monkeypatch):
    """Changing a document, its source or the padding leaves the others' logits bit-equal."""
    monkeypatch.setattr(mask_module, "LONG", 0)
    model = build(**SHAPES[name])
    model.mask_way = way
    batch = packed_batch(model.config.family)
    before = logits(model, **batch)
    sides = ["tokens"] if "source" not in batch else ["tokens", "source"]
    for side in sides:
        for number in (0, 1, 2):
            changed = dict(batch)
            if side == "tokens":
                own = batch["documents"] == number
                changed["tokens"] = torch.where(own, (batch["tokens"] + 7) % 50, batch["tokens"])
            else:
                tokens, documents, positions = batch["source"]
                changed["source"] = Source(
                    torch.where(documents == number, (tokens + 7) % 50, tokens), documents, positions
                )
            after = logits(model, **changed)
            others = (batch["documents"] != number) & (batch["documents"] > 0)
            assert torch.equal(before[others], after[others])
            if number:
                assert not torch.equal(before[batch["documents"] == number], after[batch["documents"] == number])


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "t5"])
def test_blocks_show_what_a_dense_mask_shows(build, monkeypatch, name):
    """On a CPU flex_attention has a forward only, and asks mask_mod about every pair: what tiles it would skip is the
    next test's matter. Compiled for one of them, as for each that takes ten seconds and more."""
    if name != "mistral":
        monkeypatch.setattr("llm.model.kernel._compiled_flex", lambda: flex_attention)
    model = build(**SHAPES[name])
    batch = packed_batch(model.config.family)
    with torch.no_grad():
        dense = logits(model, **batch)
        model.mask_way = "blocks"
        blocks = logits(model, **batch)
    real = batch["documents"] > 0
    torch.testing.assert_close(blocks[real], dense[real], rtol=0, atol=1e-5)


def rows_of_documents(longest):
    """Documents of given lengths, and padding behind them."""
    lengths = st.lists(st.integers(1, longest), min_size=1, max_size=6)
    return st.tuples(lengths, st.integers(0, longest)).map(
        lambda drawn: [number for number, n in enumerate(drawn[0], 1) for _ in range(n)] + [0] * drawn[1]
    )


@given(st.lists(rows_of_documents(150), min_size=1, max_size=2), st.booleans(), st.none() | st.integers(0, 300))
def test_no_tile_that_is_seen_is_skipped(rows, causal, reach):
    """The tiles that flex_attention looks into hold all that is visible, and those it does not ask about are visible
    from corner to corner."""
    length = max(map(len, rows))
    documents = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    offset = torch.arange(length) - torch.arange(length).unsqueeze(1)
    visible = documents.unsqueeze(2) == documents.unsqueeze(1)
    if causal:
        visible &= offset <= 0
    if reach is not None:
        visible &= (offset >= -reach) if causal else offset.abs() <= reach
    blocks = block_mask(documents, documents, causal=causal, reach=reach)
    partial, full = (
        spread(counts[:, 0], indices[:, 0])[:, :length, :length]
        for counts, indices in (
            (blocks.kv_num_blocks, blocks.kv_indices),
            (blocks.full_kv_num_blocks, blocks.full_kv_indices),
        )
    )
    assert not (partial & full).any()
    assert not (visible & ~partial & ~full).any()
    assert not (full & ~visible).any()
    b, q, k = torch.meshgrid(*map(torch.arange, visible.shape), indexing="ij")
    assert torch.equal(blocks.mask_mod(b, 0, q, k), visible)
    ordered = torch.where(documents == 0, 1 << 40, documents)
    needed = torch.nn.functional.pad(visible, (0, -length % 128) * 2)
    needed = needed.unflatten(2, (-1, 128)).unflatten(1, (-1, 128)).any(4).any(2)
    assert torch.equal(ordered.sort(1).values, ordered)
    assert needed.sum() == (blocks.kv_num_blocks + blocks.full_kv_num_blocks).sum(), "a tile that nobody sees is kept"


def spread(counts, indices):
    """Tiles as flex_attention lists them -> bool [B, T, S] of places."""
    tiles = torch.zeros(*indices.shape[:2], indices.shape[2], dtype=torch.bool)
    for at in torch.cartesian_prod(*map(torch.arange, counts.shape)):
        b, row = at.tolist()
        tiles[b, row, indices[b, row, : counts[b, row]].long()] = True
    return tiles.repeat_interleave(128, 1).repeat_interleave(128, 2)


def test_rows_of_one_document_need_no_mask(build):
    ones = torch.ones(2, 9, dtype=torch.long)
    places = Places(9, 0, ones, ones.device, "runs")
    assert self_mask(places, causal=True) == (None, True, None, None)
    assert cross_mask(ones, ones[:, :4], 9, "runs") == (None, False, None, None)


def test_short_rows_are_done_as_a_whole():
    documents = torch.tensor([[1] * 300 + [2] * 212])
    places = Places(512, 0, documents, documents.device, "runs")
    assert self_mask(places, causal=True).runs.queries == [[300, 212]]
    assert self_mask(places._replace(length=511, documents=documents[:, :511]), causal=True).runs is None


def test_an_encoder_sees_both_sides_and_a_window(build):
    tokens = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 7) % 50
    for shape, seen in (
        ({**BERT, "n_layers": 1}, range(12)),
        ({**MODERNBERT, "n_layers": 1, "global_every": None}, range(4, 9)),
    ):
        model = build(**shape)
        differs = (model(tokens) != model(changed)).any(-1)[0]
        assert differs.nonzero().flatten().tolist() == list(seen)


def test_every_nth_layer_sees_everything(config):
    windows = [config(**MODERNBERT).has_window(layer) for layer in range(7)]
    assert windows == [False, True, True, False, True, True, False]
    assert all(config(**MISTRAL).has_window(layer) for layer in range(3))


@given(st.integers(1, 9), st.integers(0, 5), st.integers(1, 12), st.booleans())
def test_window_is_its_definition(length, n_past, window, causal):
    mask = self_mask(Places(length, n_past, None, torch.device("cpu")), causal=causal, window=window)
    assert not (mask.causal and mask.visible is not None)
    visible = torch.ones(length, n_past + length).bool() if mask.visible is None else mask.visible[0, 0]
    visible = visible.tril() if mask.causal else visible  # only ever without a past
    for t in range(length):
        for s in range(n_past + length):
            distance = n_past + t - s
            near = 0 <= distance < window if causal else abs(distance) <= window // 2
            assert visible[t, s].item() == near


@given(st.lists(st.integers(0, 3), min_size=4, max_size=4), st.lists(st.integers(0, 3), min_size=5, max_size=5))
def test_cross_mask_is_its_definition(target, source):
    visible = cross_mask(torch.tensor([target]), torch.tensor([source]), 4).visible[0, 0]
    for t in range(4):
        for s in range(5):
            assert visible[t, s].item() == (target[t] == source[s] or target[t] == 0)


def test_relative_buckets_are_those_of_t5(config):
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    offsets = torch.arange(-300, 301)
    for buckets, distance in ((32, 128), (8, 20)):
        shape = {**T5, "relative_buckets": buckets, "relative_distance": distance}
        for causal in (True, False):
            ours = RelativePosition(config(**shape), causal=causal).buckets(offsets)
            theirs = modeling.T5Attention._relative_position_bucket(offsets, not causal, buckets, distance)
            assert torch.equal(ours, theirs)


def test_scaled_rotation_is_that_of_llama(config):
    functions = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    from llm.model import RopeScaling

    parameters = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 500.0,
    }  # fmt: skip
    theirs = transformers.LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=parameters)
    frequencies, _ = functions.ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    cosine, _ = build_rotation(torch.tensor([5]), 32, 500.0, RopeScaling(8.0, 1.0, 4.0, 64))
    torch.testing.assert_close(cosine[0, 0, :16], (5 * frequencies).cos(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["t5", "vaswani", "mistral"])
def test_cached_equals_whole(build, name):
    """Token by token and in chunks, with the source read once, padded on its right."""
    model = build(**SHAPES[name]).eval()
    tokens = torch.randint(50, (2, 10))
    source = None
    if model.encoder is not None:
        documents = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
        source = Source(torch.randint(50, (2, 7)), documents)
    expected = model(tokens, source=source)
    cache = Cache(model.config.decoder_layers, 10)
    parts = []
    for start, end in ((0, 3), (3, 4), (4, 8), (8, 9), (9, 10)):
        parts.append(model(tokens[:, start:end], cache=cache, source=source if start == 0 else None))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5)


def test_rows_of_a_cache_change_places(build):
    model = build(**T5).eval()
    tokens, source = torch.randint(50, (2, 6)), Source(torch.randint(50, (2, 7)))
    cache = Cache(2, 6)
    model(tokens[:, :5], cache=cache, source=source)
    rows = torch.tensor([1, 0, 1])
    cache.select(rows)
    last = model(tokens[rows, 5:], cache=cache)
    expected = model(tokens[rows], source=Source(source.tokens[rows]))[:, 5:]
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_matmul_flops(config, name):
    model = Transformer(config(**SHAPES[name]))
    shape = (10, 7) if model.config.family == "encoder_decoder" else (10,)
    source = Source(torch.randint(50, (3, 10))) if len(shape) == 2 else None
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        model.logits(model(torch.randint(50, (3, shape[-1])), source=source))
    assert model.matmul_flops(3, *shape) == forward.get_total_flops()


def test_flops_per_token_of_an_encoder_decoder(config):
    """A parameter counts for the tokens it meets: so with sides of one length it is nearly half of 6N."""
    model = Transformer(config(**T5))
    n = {side: sum(p.numel() for p in getattr(model, side).blocks.parameters()) for side in ("encoder", "decoder")}
    written = n["decoder"] + model.embed.weight.numel() + 32  # the tied head, and the decoder's last norm
    attention = 12 * 32 * 2 * (16 * 16 + 4 * 4 + 4 * 16)
    expected = (6 * (16 * n["encoder"] + 4 * (written + 32)) + attention) / 20
    assert model.flops_per_token(16, 4) == pytest.approx(expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_looks_its_embedding_up(config, tied):
    """Tied or not, there is one, and it is no head."""
    model = Transformer(config(family="encoder", n_labels=3, tie_embeddings=tied))
    n = sum(p.numel() for p in model.encoder.parameters()) + 3 * 32 + 3
    assert model.flops_per_token(16) == 6 * n + 12 * 2 * 32 * 16


def test_pairs_are_judged_by_their_first_token(build):
    model = build(**BERT)
    hidden = torch.randn(3, 32)
    pooled = torch.tanh(hidden @ model.pooler.weight.T + model.pooler.bias)
    expected = pooled @ model.next_sentence.weight.T + model.next_sentence.bias
    torch.testing.assert_close(model.sentence_logits(hidden), expected)


def test_a_source_too_much_or_too_few(build):
    tokens = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="encoder_decoder needs a source to read; give source="):
        build(**T5)(tokens)
    with pytest.raises(ValueError, match=r"source is given, but model\.family=decoder reads none; leave it out"):
        build()(tokens, source=Source(tokens))
    model, cache = build(**T5), Cache(2, 8)
    model(tokens, cache=cache, source=Source(tokens))
    with pytest.raises(ValueError, match="the cache holds one already; leave it out"):
        model(tokens, cache=cache, source=Source(tokens))
    with pytest.raises(ValueError, match="family=encoder reads all tokens at once; leave the cache out"):
        build(**BERT)(tokens, cache=cache)
    with pytest.raises(ValueError, match="documents of the target need documents of the source"):
        build(**T5)(tokens, torch.ones_like(tokens), source=Source(tokens))


@pytest.mark.parametrize("name", ["bert", "t5", "vaswani"])
def test_deviations(config, name):
    torch.manual_seed(0)
    model = Transformer(config(**{**SHAPES[name], "dim": 64, "ffn_dim": 256, "vocab_size": 500}))
    weights = model.state_dict()
    expected = {
        "bert": {"embed": 0.02, "encoder.blocks.0.attention.query": 0.02, "encoder.blocks.1.feed_forward.down": 0.02},
        "t5": {
            "embed": 1.0, "decoder.blocks.0.attention.query": (64 * 16) ** -0.5,
            "encoder.blocks.1.attention.out": 1 / 8,
            "encoder.blocks.0.feed_forward.down": 1 / 16, "decoder.relative.table": 1 / 8,
        },
        "vaswani": {"embed": 1 / 8, "decoder.blocks.0.cross_attention.query": (2 / 128) ** 0.5,
                    "encoder.blocks.0.feed_forward.up": (2 / 320) ** 0.5},
    }[name]  # fmt: skip
    for module, deviation in expected.items():
        weight = weights[f"{module}.weight"]
        cut = 0.88 if name == "bert" else 1.0  # a normal cut off at two deviations has 0.88 of its deviation
        tolerance = 0.2 if weight.numel() < 1000 else 0.05
        assert weight.std().item() == pytest.approx(deviation * cut, rel=tolerance), module
        if name == "bert":
            assert weight.abs().max() <= 0.04


def test_first_loss_of_t5_is_near_that_of_guessing(config):
    """Scores start with a deviation of about 1, not of sqrt(dim)."""
    torch.manual_seed(0)
    for tied in (True, False):
        model = Transformer(config(**{**T5, "dim": 64, "tie_embeddings": tied, "scale_logits": tied}))
        tokens = torch.randint(50, (8, 12))
        scores = logits(model, tokens=tokens, source=Source(tokens))
        assert scores.std().item() == pytest.approx(1.0, abs=0.4)
        assert torch.nn.functional.cross_entropy(scores.flatten(0, 1), tokens.roll(1, 1).flatten()) < math.log(50) + 1.5


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("n_decoder_layers", {"n_decoder_layers": 2}, "there is none in model.family=decoder, only in encoder_decoder"),
        ("next_sentence", {"next_sentence": True}, "there is none in model.family=decoder, only in encoder"),
        ("window", {"window": 4, **T5}, "only in encoder and decoder; leave the key out"),
        ("global_every", {"global_every": 3}, "without model.window all layers see everything"),
        ("local_rope_theta", {"local_rope_theta": 1e4}, "is for layers with a window"),
        (
            "local_rope_theta",
            {"local_rope_theta": 1e4, "position": "learned"},
            "is for model.position=rotary, not learned",
        ),
        ("relative_distance", {**T5, "relative_distance": 4}, "must be more than half of model.relative_buckets = 8"),
    ],
)
def test_keys_that_would_do_nothing_are_named(config, key, values, message):
    with pytest.raises(ValueError, match=f"model.{key} = .*{message}"):
        config(**values)


def test_config_from_a_node(config):
    from dataclasses import asdict

    from llm.model import RopeScaling, config_from

    wanted = config(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64), **MISTRAL)
    node = asdict(wanted) | {"_target_": "llm.model.TransformerConfig"}
    node["rope_scaling"]["_target_"] = "llm.model.RopeScaling"
    assert config_from(node) == wanted
    with pytest.raises(ValueError, match=r"low_freq_factor = 4.0: must be below high_freq_factor = 1.0"):
        RopeScaling(8.0, 4.0, 1.0, 64)
