"""What strategies do to a network before it trains: in the right order, and with the same weights as without them."""

from __future__ import annotations

from functools import partial, partialmethod
from typing import Literal
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from llm.model import Source, Transformer, TransformerConfig
from llm.model.mask import Places, self_mask
from llm.strategy import FSDP
from llm.strategy.activation_checkpointing import Checkpointing
from llm.strategy.apply import apply
from llm.strategy.materialise import materialise
from llm.strategy.tensor_parallel import plan, problems
from tests.ranks import run_on_ranks

NETWORKS = {
    "llama": TransformerConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_length=16, vocab_size=51, qk_norm=True),
    "gpt2": TransformerConfig(
        dim=32,
        n_layers=2,
        n_heads=4,
        max_length=16,
        vocab_size=51,
        position="learned",
        norm="layer",
        activation="gelu_tanh",
        bias=True,
        tie_embeddings=True,
        initialisation="gpt2",
    ),
    "post-norm": TransformerConfig(
        dim=32, n_layers=2, n_heads=4, max_length=16, vocab_size=51, position="sinusoidal", norm_position="post"
    ),
    "bert": TransformerConfig(
        family="encoder",
        dim=32,
        n_layers=2,
        n_heads=4,
        max_length=16,
        vocab_size=51,
        position="learned",
        n_segments=2,
        norm="layer",
        norm_position="post",
        embed_norm=True,
        activation="gelu",
        bias=True,
        tie_embeddings=True,
        head_bias=True,
        next_sentence=True,
        initialisation="bert",
    ),
    "t5": TransformerConfig(
        family="encoder_decoder",
        dim=32,
        n_layers=2,
        n_decoder_layers=1,
        n_heads=4,
        max_length=16,
        vocab_size=51,
        position="relative",
        activation="geglu",
        qk_norm=True,
        scale_attention=False,
        initialisation="t5",
    ),
}


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(51, (2, 16), generator=draw), torch.tensor([[1] * 9 + [2] * 7, [1] * 16])


def gradients(network: Transformer) -> dict[str, Tensor]:
    tokens, documents = batch()
    source = None
    if network.config.family == "encoder_decoder":
        source = Source(tokens.roll(1, 1)[:, :12], documents.roll(1, 1)[:, :12])
    hidden = network(tokens, documents, source=source)
    loss = network.logits(hidden).logsumexp(-1).sum()
    if network.config.next_sentence:
        loss = loss + network.sentence_logits(hidden[:, [0, 9]]).logsumexp(-1).sum()
    loss.backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def built(name: str) -> Transformer:
    torch.manual_seed(0)
    return Transformer(NETWORKS[name])


# Meta device


def drawn_on_mesh(name: str, n_replicas: int, n_shards: int, n_tensor: int, blocks: bool = False) -> dict[str, Tensor]:
    """The initial weights, and the gradients, of a network built on the meta device and spread over a mesh."""
    mesh = init_device_mesh("cpu", (n_replicas, n_shards, n_tensor), mesh_dim_names=("replicate", "shard", "tensor"))
    with torch.device("meta"):
        network = Transformer(NETWORKS[name])

    def shard(network: Transformer) -> None:
        for block in network.blocks:
            fully_shard(block, mesh=mesh["replicate", "shard"])
        fully_shard(network, mesh=mesh["replicate", "shard"], reshard_after_forward=False)

    # The gradients are AOTAutograd's; generating C++ from the graphs is slow.
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        apply(
            network,
            tensor_mesh=mesh["tensor"] if n_tensor > 1 else None,
            compile="blocks" if blocks else "none",
            shard=shard,
        )
    torch.manual_seed(0)
    materialise(network, torch.device("cpu"))
    weights = whole(network.state_dict())
    assert network.head.weight is network.embed.weight or not NETWORKS[name].tie_embeddings
    return {**weights, **{f"{name}.grad": g for name, g in whole(gradients(network)).items()}}


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


@pytest.mark.parametrize("mesh", [(1, 2, 1), (1, 1, 2), (2, 1, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_on_a_mesh_is_the_network(name: str, mesh: tuple[int, int, int]) -> None:
    """Bit for bit the weights of a direct build; gradients to rounding (of the same data in each process)."""
    direct = built(name)
    expected = gradients(direct)
    n = mesh[0] * mesh[1] * mesh[2]
    for drawn in run_on_ranks(drawn_on_mesh, n, name, *mesh):
        for parameter, weight in direct.state_dict().items():
            assert torch.equal(drawn[parameter], weight), parameter
        for parameter, gradient in expected.items():
            torch.testing.assert_close(drawn[f"{parameter}.grad"], gradient, rtol=1e-4, atol=1e-5)


def test_compiled_blocks_of_tensor_parallelism_lose_no_gradient() -> None:
    """Of torch 2.13: an embedding whose sum is still on its way into a compiled block gets the gradient 0. One to which
    positions are added is not: nothing may lie between the embedding and the first block."""
    expected = gradients(built("llama"))
    drawn, _ = run_on_ranks(drawn_on_mesh, 2, "llama", 1, 1, 2, True, timeout_s=100)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(drawn[f"{parameter}.grad"], gradient, rtol=1e-4, atol=1e-5)


def test_a_module_without_reset_parameters_is_named() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    with torch.device("meta"):
        network = Transformer(NETWORKS["llama"])
        network.blocks[1].scale = Scale()
    with pytest.raises(
        TypeError, match=r"decoder\.blocks\.1\.scale \(Scale\) owns parameters or buffers but has no reset_param"
    ):
        materialise(network, torch.device("cpu"))


# Tensor parallelism


@pytest.mark.parametrize("name", NETWORKS)
def test_the_plan_names_every_parameter(name: str) -> None:
    network = built(name)
    owners = {owner.rpartition(".")[0] for owner, _ in network.named_parameters(remove_duplicate=False)}
    assert owners <= set(plan(network))


def test_widths_that_cannot_be_shared() -> None:
    config = TransformerConfig(dim=24, n_layers=1, n_heads=3, n_kv_heads=1, ffn_dim=10, max_length=8, vocab_size=7)
    assert problems(config, 4) == [
        "strategy.tensor_parallel_size: 4 - must divide model.n_heads, which is 3 - change one of the two",
        "strategy.tensor_parallel_size: 4 - must divide model.n_kv_heads, which is 1 - change one of the two",
        "strategy.tensor_parallel_size: 4 - must divide model.ffn_dim, which is 10 - change one of the two",
    ]
    assert problems(config, 1) == []
    assert FSDP(replicate_size=2).problems(config, 3, "cpu", "32-true", True) == [
        "strategy.replicate_size x strategy.tensor_parallel_size: 2 x 1 - must divide the 3 processes of the run - "
        "change them, or trainer.devices and trainer.num_nodes"
    ]


# Activation checkpointing, and compiling


class Saved:
    """Bytes that autograd keeps between forward and backward."""

    def __init__(self) -> None:
        self.n_bytes = 0

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.hooks.__exit__()

    def pack(self, tensor: Tensor) -> Tensor:
        self.n_bytes += tensor.numel() * tensor.element_size()
        return tensor


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_checkpointing_changes_no_bit(checkpointing: Checkpointing, name: str) -> None:
    """Dropout included: the second forward draws what the first drew."""
    expected, got = [], []
    for gathered, what in ((expected, "none"), (got, checkpointing)):
        network = built(name)
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        apply(network, checkpointing=what)
        torch.manual_seed(2)
        gathered.append(gradients(network))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_full_checkpointing_keeps_the_input_of_a_block_only() -> None:
    kept = {}
    for checkpointing in ("none", "full"):
        network = built("llama")
        apply(network, checkpointing=checkpointing)
        tokens, documents = batch()
        hidden = network.embed(tokens).requires_grad_()
        mask = self_mask(Places(16, 0, documents, documents.device), causal=True)
        with Saved() as saved:
            network.blocks[0](hidden, mask, None)
        kept[checkpointing] = saved.n_bytes
    assert kept["full"] == 2 * 16 * 32 * 4
    assert kept["none"] > 10 * kept["full"]


@pytest.mark.parametrize(
    ("name", "compile", "checkpointing", "sharded"),
    [
        ("llama", "blocks", "none", False),
        ("llama", "blocks", "full", True),
        ("llama", "blocks", "selective", True),
        ("gpt2", "whole", "selective", False),
    ],
)
def test_compiles_without_a_break_and_once(
    name: str,
    compile: Literal["blocks", "whole"],
    checkpointing: Checkpointing,
    sharded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One graph for all blocks, or for the whole network, around activation checkpointing and inside sharding's
    hooks."""
    from torch._dynamo.utils import counters

    # Graphs are what is looked at here; generating C++ from them is slow.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch._dynamo.reset()
        counters.clear()
        expected = gradients(built(name))
        network = built(name)
        mesh = init_device_mesh("cpu", (1,))

        def shard(network: Transformer) -> None:
            for block in network.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(network, mesh=mesh, reshard_after_forward=False)

        apply(network, checkpointing=checkpointing, compile=compile, shard=shard if sharded else None)
        assert list(network.state_dict()) == list(built(name).state_dict())
        got = whole(gradients(network))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
    finally:
        torch._dynamo.reset()
        dist.destroy_process_group()
