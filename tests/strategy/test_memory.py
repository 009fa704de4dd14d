"""The memory that is promised: what checkpointing keeps of a block, and what a rank holds while weights are drawn."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from llm.model import Transformer, TransformerConfig
from llm.model.mask import Places, self_mask
from llm.model.position import build_rotation
from llm.strategy import FSDP
from llm.strategy.activation_checkpointing import Checkpointing
from llm.strategy.apply import apply
from llm.strategy.materialise import materialise
from llm.strategy.process_group import fake_ranks
from tests.strategy.living import Living

LLAMA = TransformerConfig(dim=64, n_layers=1, n_heads=8, n_kv_heads=2, ffn_dim=224, max_length=64, vocab_size=51)
GPT2 = replace(LLAMA, n_kv_heads=None, ffn_dim=256, position="learned", norm="layer", activation="gelu", bias=True)
N_ROWS, LENGTH = 2, 64
UNIT = N_ROWS * LENGTH * 64 * 4  # one hidden state in float32
PER_HEAD = N_ROWS * LENGTH * 8 * 4  # one number per query and head: the logarithm of a softmax's divisor


def kept(config: TransformerConfig, checkpointing: Checkpointing) -> float:
    """What a block keeps from its forward to its backward, in hidden states, its input among it; without the weights,
    the mask, and numbers per row and head."""
    network = Transformer(config)
    apply(network, checkpointing=checkpointing)
    documents = torch.ones(N_ROWS, LENGTH, dtype=torch.long)
    mask = self_mask(Places(LENGTH, 0, documents, documents.device), causal=True)._replace(visible=None)
    rotation = None
    if config.position == "rotary":
        rotation = build_rotation(torch.arange(LENGTH), config.head_width, config.rope_theta)
    hidden = torch.randn(N_ROWS, LENGTH, 64, requires_grad=True)
    with Living() as living:
        out = network.blocks[0](hidden, mask, rotation)
    n_bytes = living.n_bytes(without=(hidden, out, *network.parameters()))
    small = PER_HEAD if checkpointing != "full" else 0  # and of each norm one or two per row
    assert 0 <= (n_bytes - small) % UNIT <= 4 * N_ROWS * LENGTH * 4
    return 1 + (n_bytes - small) // UNIT


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (replace(LLAMA, n_kv_heads=8), {"none": 24, "selective": 13, "full": 1}),
        (GPT2, {"none": 16, "selective": 10, "full": 1}),
        (replace(GPT2, activation="gelu_tanh"), {"none": 20, "selective": 10, "full": 1}),
        (replace(GPT2, norm_position="post"), {"none": 16, "selective": 11, "full": 1}),
    ],
    ids=["gated", "plain", "gelu_tanh", "post-norm"],
)
def test_what_a_block_keeps(config: TransformerConfig, expected: dict[Checkpointing, int]) -> None:
    """The formulas of llm/strategy/activation_checkpointing.py; on a CPU gelu_tanh keeps its gate, which is as wide as
    the hidden layer of the feed-forward."""
    assert {checkpointing: kept(config, checkpointing) for checkpointing in expected} == expected


def test_drawing_takes_a_part_and_one_module() -> None:
    """On each of 8 ranks, however large the whole is: the bound of benchmarks/initialise_8b.py."""
    config = TransformerConfig(dim=64, n_layers=8, n_heads=4, max_length=16, vocab_size=1000)
    strategy = FSDP()
    with fake_ranks(8), Living() as living:
        strategy._device_mesh = init_device_mesh("cpu", (1, 8, 1), mesh_dim_names=("replicate", "shard", "tensor"))
        with strategy.model_sharded_context():
            network = Transformer(config)
        apply(network, shard=partial(strategy._shard, mesh=strategy._data_mesh()))
        before = living.peak
        materialise(network, torch.device("cpu"))
        part = sum(parameter.to_local().numel() * 4 for parameter in network.parameters())  # type: ignore[attr-defined]
    whole, largest = network.n_parameters() * 4, 1000 * 64 * 4
    assert before < largest / 10, "built without memory"
    assert part == pytest.approx(whole / 8, rel=0.01)
    assert living.peak <= part + 1.25 * largest
    assert living.peak < whole / 2
