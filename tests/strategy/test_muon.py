"""Muon's work shared out: the weights of one process, each matrix orthogonalised once, and the bytes that takes."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from llm.checkpoint import place
from llm.model import Transformer, TransformerConfig
from llm.optimizer import MuonAdamW
from llm.optimizer.groups import hidden_matrices
from llm.optimizer.muon import plan
from llm.reduce import world_size
from llm.strategy import FSDP
from llm.strategy.process_group import fake_ranks
from tests.ranks import run_on_ranks
from tests.strategy.test_wire import Wire, network_on_mesh, place_network

# Squares, wide and tall matrices; four layers: of each shape a multiple of eight.
CONFIG = TransformerConfig(
    dim=32, n_layers=4, n_heads=2, ffn_dim=64, activation="gelu", max_length=16, vocab_size=51, bias=True, norm="layer"
)
# Rows that processes cannot share evenly: with tensor parallelism those of one share of the heads.
UNEVEN = replace(CONFIG, dim=24, n_heads=4, n_kv_heads=2, ffn_dim=34)
LAYOUTS: dict[str, tuple[int, FSDP | None, TransformerConfig]] = {
    "ddp x2": (2, None, CONFIG),
    "ddp x3": (3, None, UNEVEN),
    "fsdp x2": (2, FSDP(), CONFIG),
    "fsdp x3": (3, FSDP(), UNEVEN),
    "hsdp 2x2": (4, FSDP(replicate_size=2), CONFIG),
    "fsdp+tp 2x2": (4, FSDP(tensor_parallel_size=2), UNEVEN),
}
LR, N_STEPS = 1e-2, 3


class Stepped(NamedTuple):
    weights: dict[str, Tensor]
    momenta: dict[str, Tensor]
    n_flops: int  # of this process's matrix products in one step


def stepped(strategy: FSDP | None, config: TransformerConfig) -> Stepped:
    """A network after some steps on gradients that are drawn, in this process's world."""
    torch.manual_seed(0)
    network = Transformer(config) if strategy is None else place_network(strategy, world_size(), config)
    optimizer = MuonAdamW(lr=LR).build(network)
    for step in range(N_STEPS):
        for name, parameter in network.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{step} {name}".encode()))
            parameter.grad = place(torch.randn(parameter.shape, generator=generator), parameter)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
    whole = {name: _whole(parameter.detach()) for name, parameter in network.named_parameters()}
    momenta = {
        name: _whole(optimizer.state[parameter]["momentum_buffer"])
        for name, parameter in network.named_parameters()
        if "momentum_buffer" in optimizer.state[parameter]
    }
    return Stepped(whole, momenta, counter.get_total_flops())


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_and_work(name: str) -> None:
    n, strategy, config = LAYOUTS[name]
    alone = stepped(None, config)
    shared = run_on_ranks(stepped, n, strategy, config)
    # A unit in bfloat16's last place of each update, whose entries are about 1 at most.
    rounding = N_STEPS * LR * 0.2 * 64**0.5 * 2**-8
    for there in shared:
        torch.testing.assert_close(there.momenta, alone.momenta, rtol=0, atol=0)
        torch.testing.assert_close(there.weights, alone.weights, rtol=0, atol=rounding)
        torch.testing.assert_close(there.weights, shared[0].weights, rtol=0, atol=0)
    assert len(alone.momenta) == 6 * CONFIG.n_layers
    assert sum(there.n_flops for there in shared) == alone.n_flops, "each matrix is orthogonalised once"
    assert max(there.n_flops for there in shared) < 1.25 * alone.n_flops / n


@pytest.mark.parametrize(("world_size", "n_replicas"), [(2, 1), (8, 1), (8, 2)])
def test_wire_of_shards(world_size: int, n_replicas: int) -> None:
    """To the owner, and back to every replica, 2 bytes an element; what a process owns itself of that does not travel.

    Of P elements over W processes, S of which make a replica, 2 P/W bytes of parts leave each process, but for 1/S of
    them, and 2 P/S of results, but for 1/W.
    """
    n_shards = world_size // n_replicas
    with network_on_mesh(FSDP(replicate_size=n_replicas), world_size, CONFIG) as network:
        n_elements = sum(matrix.numel() for matrix in hidden_matrices(network))
        with Wire() as wire:
            _step(network)
    owned = n_elements // world_size
    parts, results = owned - owned // n_shards, n_elements // n_shards - owned // n_shards
    assert wire.n_bytes == {"alltoall_base_": 2 * (parts + results)}
    assert wire.n_calls["alltoall_base_"] == 2


@pytest.mark.parametrize("world_size", [2, 8])
def test_wire_of_copies(world_size: int) -> None:
    """Gradients are everywhere already: a ring in which (W-1)/W of 2 P bytes pass each process."""
    with fake_ranks(world_size), Wire() as wire:
        network = Transformer(CONFIG)
        _step(network)
    assert wire.n_bytes == {"_allgather_base_": 2 * sum(matrix.numel() for matrix in hidden_matrices(network))}


def test_more_processes_than_matrices() -> None:
    """24 matrices over 64: the largest is the first's, and those without one give their parts all the same."""
    with network_on_mesh(FSDP(), 64, CONFIG) as network:
        rounds = plan(hidden_matrices(network))
        assert [len(round_.owned.mine) for round_ in rounds] == [1]
        with Wire() as wire:
            _step(network)
    # What it sends: of 64 rows of 32 the 63 that others hold, and its own row of each other matrix that has one for it.
    own, others = 63 * 32, 3 * 32 + 4 * 64 + 16 * 32
    assert wire.n_bytes == {"alltoall_base_": 2 * (own + others)}


def _step(network: Transformer) -> None:
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    MuonAdamW(lr=LR).build(network).step()
