from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from llm.model import Transformer, TransformerConfig
from llm.optimizer import AdamW, MuonAdamW
from llm.optimizer.groups import decay_groups, hidden_matrices


def model(**settings: object) -> Transformer:
    torch.manual_seed(0)
    defaults = TransformerConfig(
        dim=16, n_layers=2, n_heads=2, ffn_dim=32, vocab_size=11, max_length=8, bias=True, norm="layer"
    )
    return Transformer(replace(defaults, **settings))  # type: ignore[arg-type]


def train(network: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int, first: int = 0) -> None:
    for step in range(first, first + n_steps):
        tokens = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(step))
        logits = network.logits(network(tokens))  # type: ignore[operator]
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tied", [True, False])
def test_vectors_do_not_decay_and_every_weight_is_in_one_group(tied: bool) -> None:
    network = model(tie_embeddings=tied)
    decayed, rest = decay_groups(network, 0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in rest["params"])
    ids = [id(p) for group in (decayed, rest) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in network.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_muon_takes_the_matrices_of_the_blocks_only(tied: bool) -> None:
    network = model(tie_embeddings=tied)
    expected = {id(p) for name, p in network.named_parameters() if ".blocks." in name and p.ndim == 2}
    assert {id(p) for p in hidden_matrices(network)} == expected


def test_adamw_is_torch_adamw() -> None:
    ours, theirs = model(), model()
    train(ours, AdamW(lr=1e-2, weight_decay=0.1).build(ours), 5)
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    train(theirs, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True), 5)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_muon_adamw_is_muon_and_adamw_side_by_side() -> None:
    ours, theirs = model(), model()
    train(ours, MuonAdamW(lr=1e-2, weight_decay=0.1).build(ours), 5)
    matrices = hidden_matrices(theirs)
    rest = [p for p in theirs.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)

    class Both(torch.optim.Optimizer):
        def __init__(self) -> None:
            pass

        def step(self) -> None:  # type: ignore[override]
            muon.step()
            adamw.step()

        def zero_grad(self, set_to_none: bool = True) -> None:
            muon.zero_grad()
            adamw.zero_grad()

    train(theirs, Both(), 5)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("recipe", [AdamW(lr=1e-2), MuonAdamW(lr=1e-2)])
def test_state_dict_round_trip_goes_on_bitwise(recipe: AdamW | MuonAdamW) -> None:
    straight = model()
    optimizer = recipe.build(straight)
    train(straight, optimizer, 3)
    resumed = model()
    resumed.load_state_dict(straight.state_dict())
    again = recipe.build(resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(straight, optimizer, 3, first=3)
    train(resumed, again, 3, first=3)
    torch.testing.assert_close(straight.state_dict(), resumed.state_dict(), rtol=0, atol=0)


def test_learning_rate_of_every_group_can_be_set_from_outside() -> None:
    network = model()
    before = copy.deepcopy(network.state_dict())
    optimizer = MuonAdamW(lr=1e-2).build(network)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(network, optimizer, 2)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
