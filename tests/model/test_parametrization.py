"""mup: every parameter has a role, and the table of roles is what layers, multipliers and groups are made of."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from llm.model import Source, Transformer, TransformerConfig
from llm.model.parametrization import logits_scale, scores_scale
from llm.optimizer import AdamW, MuonAdamW

SHAPE: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "ffn_dim": 80, "vocab_size": 50, "max_length": 24}
# Each with all parameters that there can be, under every rule for initial weights.
NETWORKS: dict[str, dict[str, Any]] = {
    "decoder": {"position": "learned", "bias": True, "norm": "layer", "qk_norm": True, "initialisation": "gpt2"},
    "gated": {"n_kv_heads": 2, "tie_embeddings": True, "initialisation": "llama"},
    "encoder": {
        "family": "encoder",
        "n_segments": 2,
        "next_sentence": True,
        "embed_norm": True,
        "position": "learned",
        "norm_position": "post",
        "bias": True,
        "head_bias": True,
        "tie_embeddings": True,
        "initialisation": "bert",
    },
    "classifier": {"family": "encoder", "n_labels": 7, "activation": "gelu", "initialisation": "gpt2"},
    "t5": {
        "family": "encoder_decoder",
        "position": "relative",
        "scale_attention": False,
        "scale_logits": True,
        "tie_embeddings": True,
        "initialisation": "t5",
        "activation": "relu",
    },
    "vaswani": {"family": "encoder_decoder", "position": "sinusoidal", "initialisation": "vaswani", "head_bias": True},
}
# Names -> what grows: inputs and outputs, or none.
ROLES: dict[str, tuple[str, str]] = {
    "embed.weight": ("", ""),
    "*.position.table.weight": ("", ""),
    "*.segment.weight": ("", ""),
    "*.relative.table.weight": ("", ""),
    "*.bias": ("", ""),
    "*norm.weight": ("", ""),
    "*attention.query.weight": ("dim", "dim"),
    "*attention.key.weight": ("dim", "dim"),
    "*attention.value.weight": ("dim", "dim"),
    "*attention.out.weight": ("dim", "dim"),
    "*.feed_forward.up.weight": ("dim", "ffn"),
    "*.feed_forward.gate.weight": ("dim", "ffn"),
    "*.feed_forward.down.weight": ("ffn", "dim"),
    "transform.dense.weight": ("dim", "dim"),
    "pooler.weight": ("dim", "dim"),
    "next_sentence.weight": ("dim", ""),
    "classifier.weight": ("dim", ""),
    "head.weight": ("dim", ""),
}


def role(name: str) -> tuple[str, str]:
    (found,) = {growth for pattern, growth in ROLES.items() if fnmatchcase(name, pattern)}
    return found


def build(name: str, **changes: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**(SHAPE | NETWORKS[name] | changes)))


def mup(name: str, **changes: Any) -> Transformer:
    """Three times as wide as SHAPE, the feed-forward five times."""
    wide = {"dim": 96, "ffn_dim": 400, "parametrization": "mup", "base_dim": 32, "base_ffn_dim": 80}
    return build(name, **(wide | changes))


def loss(network: Transformer, tokens: Tensor) -> Tensor:
    source = Source(tokens) if network.config.family == "encoder_decoder" else None
    hidden = network(tokens, source=source)
    if network.config.n_labels is not None:
        return network.label_logits(hidden[:, 0]).logsumexp(-1).sum()
    extra = network.sentence_logits(hidden[:, 0]).sum() if network.config.next_sentence else 0.0
    return nn.functional.cross_entropy(network.logits(hidden).flatten(0, 1), tokens.flatten()) + extra


@pytest.mark.parametrize("recipe", [AdamW(lr=1e-2), MuonAdamW(lr=1e-2)], ids=["adamw", "muon"])
@pytest.mark.parametrize("name", NETWORKS)
def test_at_its_base_it_is_the_standard_parametrization(name: str, recipe: AdamW | MuonAdamW) -> None:
    """To the bit: weights, groups, losses and what they become."""
    standard, same = build(name), build(name, parametrization="mup", base_dim=32)
    torch.testing.assert_close(dict(same.named_parameters()), dict(standard.named_parameters()), rtol=0, atol=0)
    optimizers = [recipe.build(network) for network in (standard, same)]
    groups = [[{**group, "params": len(group["params"])} for group in o.param_groups] for o in optimizers]
    assert groups[0] == groups[1]
    for step in range(3):
        tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(step))
        losses = [loss(network, tokens) for network in (standard, same)]
        assert losses[0].item() == losses[1].item()
        for found, optimizer in zip(losses, optimizers, strict=True):
            found.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(dict(same.named_parameters()), dict(standard.named_parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_standard_layers_have_one_rate_and_no_multiplier(name: str) -> None:
    network = build(name)
    assert {group["lr"] for group in AdamW(lr=1e-2).build(network).param_groups} == {1e-2}
    assert {group["weight_decay"] for group in AdamW(lr=1e-2).build(network).param_groups} == {0.1, 0.0}
    scales = {block.attention.scale for block in network.blocks}
    assert scales == ({1.0} if name == "t5" else {None})
    assert network.logits_scale == (32**-0.5 if name == "t5" else 1.0)


@pytest.mark.parametrize("name", NETWORKS)
def test_deviations_of_every_parameter(name: str) -> None:
    """Yang et al. 2022, table 8: 1 / sqrt(inputs) for what grows on both sides, 1 / inputs for a fixed number of
    outputs, nothing for the rest; measured on the weights, against those of a network at the base."""
    narrow, wide = build(name), mup(name)
    before = dict(narrow.named_parameters())
    times = {"": 1.0, "dim": 3.0, "ffn": 5.0}
    for parameter_name, parameter in wide.named_parameters():
        n_in, n_out = role(parameter_name)
        expected = times[n_in] ** (-0.5 if n_out else -1.0) if n_in else 1.0
        if parameter.ndim < 2:
            assert torch.equal(parameter.unique(), before[parameter_name].unique()), parameter_name
            continue
        if parameter.numel() < 500:  # two segments: its layer says it
            module, base = (network.get_submodule(parameter_name[:-7]) for network in (wide, narrow))
            assert module.std == pytest.approx(base.std * expected, rel=1e-9), parameter_name
            continue
        found = parameter.std().item() / before[parameter_name].std().item()
        assert found == pytest.approx(expected, rel=0.12), parameter_name


def rates(recipe: AdamW | MuonAdamW, network: Transformer) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = recipe.build(network).param_groups
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", NETWORKS)
def test_rates_of_every_parameter(name: str) -> None:
    """AdamW: inputs at the base over inputs now (table 8; a tied head is an embedding). What decays in a step, the
    product, is the same."""
    network, times = mup(name), {"": 1.0, "dim": 3.0, "ffn": 5.0}
    found = rates(AdamW(lr=1e-2, weight_decay=0.1), network)
    assert found.keys() == dict(network.named_parameters()).keys()
    for parameter_name, (lr, weight_decay) in found.items():
        n_in, _ = role(parameter_name)
        assert lr == pytest.approx(1e-2 / times[n_in]), parameter_name
        assert lr * weight_decay == pytest.approx(
            1e-3 if "norm" not in parameter_name and "bias" not in parameter_name else 0.0
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_muon_moves_every_matrix_as_a_spectral_norm_has_to_grow(name: str) -> None:
    """Yang, Simon and Bernstein 2023, condition 1: sqrt(outputs / inputs); measured as the norm of what a step changes,
    in widths that grow by different factors."""
    moved = []
    for network in (build(name), mup(name)):
        optimizer = MuonAdamW(lr=1e-2, weight_decay=0.0).build(network)
        before = {key: p.detach().clone() for key, p in network.named_parameters()}
        for number, parameter in enumerate(network.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()
        taken = {id(p) for group in optimizer.param_groups if group["algorithm"] == "muon" for p in group["params"]}
        moved.append(
            {
                key: (torch.linalg.matrix_norm(p - before[key], 2).item() * math.sqrt(p.shape[1] / p.shape[0]))
                for key, p in network.named_parameters()
                if id(p) in taken
            }
        )
    assert len(moved[0]) > 10
    for key, norm in moved[0].items():
        assert moved[1][key] == pytest.approx(norm, rel=0.12), key  # five iterations leave singular values 0.7 to 1.2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, math.sqrt(8) / 24),  # as many heads, which grow from 8 to 24
        ({"head_dim": 8, "n_heads": 12}, None),  # more heads of 8: the kernel's own 1 / sqrt(8)
        ({"scale_attention": False}, 8 / 24),
        ({"scale_attention": False, "head_dim": 8}, 1.0),
        ({"parametrization": "standard", "base_dim": None, "base_ffn_dim": None}, None),
    ],
)
def test_scores_fall_as_the_width_of_a_head(changes: dict[str, Any], expected: float | None) -> None:
    config = replace(mup("gated").config, **changes)
    assert scores_scale(config) == (expected if expected is None else pytest.approx(expected))
    assert Transformer(config).blocks[0].attention.scale == scores_scale(config)


@given(width=st.integers(1, 40), tied=st.booleans())
def test_logits_of_a_tied_head_are_divided_by_the_growth(width: int, tied: bool) -> None:
    config = replace(build("gated").config, dim=8 * width, parametrization="mup", base_dim=32, tie_embeddings=tied)
    assert logits_scale(config) == pytest.approx(32 / (8 * width) if tied else 1.0)
    assert logits_scale(replace(config, scale_logits=True)) == pytest.approx(logits_scale(config) / math.sqrt(32))


def test_a_network_computes_what_its_multipliers_say() -> None:
    """Against a naive decoder of one layer: softmax(q k · sqrt(K0) / K) v, and logits · dim0 / dim."""
    network = mup("gated", n_layers=1, n_kv_heads=None, position="learned").eval()
    tokens = torch.randint(50, (1, 7))
    block = network.decoder.blocks[0]
    hidden = network.embed(tokens) + network.decoder.position.table(torch.arange(7))
    normed = block.attention_norm(hidden)
    q, k, v = (
        layer(normed).view(7, 4, 24).transpose(0, 1)
        for layer in (block.attention.query, block.attention.key, block.attention.value)
    )
    scores = (q @ k.transpose(1, 2) * math.sqrt(8) / 24).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
    hidden = hidden + block.attention.out((scores.softmax(-1) @ v).transpose(0, 1).reshape(1, 7, 96))
    hidden = network.decoder.norm(hidden + block.feed_forward(block.feed_forward_norm(hidden)))
    torch.testing.assert_close(
        network.logits(network(tokens)), hidden @ network.embed.weight.T / 3, rtol=1e-4, atol=1e-5
    )


def test_sinusoids_are_added_to_an_embedding_of_the_same_size() -> None:
    for network in (build("vaswani"), mup("vaswani")):
        scaled = network.encoder.position(network.embed.weight[:, None], torch.zeros(1)) - network.encoder.position(
            torch.zeros_like(network.embed.weight[:, None]), torch.zeros(1)
        )
        assert scaled.std().item() == pytest.approx(1.0, rel=0.1)


def test_a_gated_feed_forward_that_follows_dim_was_what_followed_there() -> None:
    config = TransformerConfig(**SHAPE | {"ffn_dim": None, "dim": 256, "parametrization": "mup", "base_dim": 64})
    assert (config.ffn_width, config.base_ffn_width) == (704, 192)  # 682.7 and 170.7, in multiples of 64
    assert Transformer(config).blocks[0].feed_forward.down.base_shape == (64, 192)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"base_dim": None, "base_ffn_dim": None},
            "model.base_dim = None: model.parametrization=mup scales from the width that hyper-parameters were chosen "
            "at; set it to that dim",
        ),
        (
            {"parametrization": "standard", "base_ffn_dim": None},
            "model.base_dim = 32: does nothing under model.parametrization=standard; set that to mup, or leave the "
            "key null",
        ),
        (
            {"parametrization": "standard", "base_dim": None},
            "model.base_ffn_dim = 80: does nothing under model.parametrization=standard; set that to mup, or leave the "
            "key null",
        ),
        (
            {"base_dim": 30},
            "model.base_dim = 30: had no model.n_heads = 4 heads; set model.head_dim = 24 if heads were added "
            "since, or take a multiple of model.n_heads",
        ),
        ({"base_dim": 0}, "model.base_dim = 0: must be at least 1"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mup("gated", **changes)
