"""Blocks in float8: refused where it makes no sense, and otherwise nearly the same training of the same weights.

No CPU multiplies in float8: here numbers are cast to it and multiplied in float32, which rounds alike.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from llm.config import ConfigError
from llm.model import Transformer, TransformerConfig
from llm.run import run
from llm.strategy import float8
from llm.strategy.float8 import convert, problems
from llm.strategy.materialise import materialise
from tests.runs import Compose
from tests.strategy.test_apply import NETWORKS, batch, built, whole

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is an extra")

LARGE = TransformerConfig(dim=2048, n_layers=24, n_heads=16, max_length=2048, vocab_size=32000)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as can be asked: a GPU that can, and torchao."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.mark.usefixtures("on_a_gpu")
def test_where_it_makes_no_sense_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(LARGE, "cuda") == []
    assert problems(LARGE, "cuda", 2) == [
        "strategy.float8: true - is not for matrices that processes share - set strategy.tensor_parallel_size to 1"
    ]
    assert problems(replace(LARGE, ffn_dim=5000), "cuda") == [
        "strategy.float8: true - needs multiples of 16, and model.ffn_dim is 5000 - change it, or set "
        "strategy.float8 to false"
    ]
    assert problems(replace(LARGE, n_layers=2), "cuda") == [
        "strategy.float8: true - is slower or no faster below 1,000,000,000 parameters, and this model has "
        "232,269,824 - set it to false"
    ]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    assert problems(LARGE, "cuda") == [
        "strategy.float8: true - needs compute capability 8.9, which A100 has not - set it to false"
    ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert problems(LARGE, "cpu") == [
        "strategy.float8: true - a CPU has no such products - set it to false",
        "strategy.float8: true - needs torchao - pip install 'llm-on-lightning[float8]'",
    ]


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_refused_before_anything_is_built(strategy: str, compose_run: Compose) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.float8: true - a CPU has no such products"):
        run(compose_run(f"strategy={strategy}", "strategy.float8=true"))


def losses(network: Transformer) -> list[float]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    tokens, documents = batch()
    found = []
    for _ in range(20):
        logits = network.logits(network(tokens, documents))[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@needs_torchao
def test_blocks_train_to_nearly_the_same_loss() -> None:
    expected = losses(built("llama"))
    network = built("llama")
    convert(network, emulate=True)
    kinds = [type(module).__name__ for module in network.modules()]
    assert kinds.count("Float8Linear") == 2 * 7
    assert type(network.head).__name__ == "Head"
    got = losses(network)
    assert expected[-1] < 0.7 * expected[0]
    torch.testing.assert_close(got, expected, rtol=0.03, atol=0.03)
    assert got != expected, "something is rounded"


@needs_torchao
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_weights_and_their_names_stay(name: str) -> None:
    """Also when they are drawn after the conversion, and spread."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.device("meta"):
            network = Transformer(NETWORKS[name])
        float8.convert(network, emulate=True)
        for block in network.blocks:
            fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
        torch.manual_seed(0)
        materialise(network, torch.device("cpu"))
        torch.testing.assert_close(whole(network.state_dict()), dict(built(name).state_dict()), rtol=0, atol=0)
    finally:
        dist.destroy_process_group()
