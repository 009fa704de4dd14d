"""What is done to a network between building and training it, in the one order that works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import lightning as L
import torch
from torch.distributed.device_mesh import DeviceMesh

from llm.model import Transformer
from llm.strategy.activation_checkpointing import Checkpointing, checkpoint_block
from llm.strategy.compiling import compile_network
from llm.strategy.float8 import convert
from llm.strategy.tensor_parallel import split


def vocabulary_multiple(device: torch.device) -> int:
    """What the width of the scores has to be divisible by for the fastest kernels; a CPU does not mind."""
    return 1 if device.type == "cpu" else 64


def network_of(objective: L.LightningModule | None) -> Transformer:
    """The network inside what Lightning trains."""
    network = getattr(objective, "network", None)
    assert isinstance(network, Transformer), f"{objective} has no Transformer named network"
    return network


def apply(
    network: Transformer,
    *,
    tensor_mesh: DeviceMesh | None = None,
    float8: bool = False,
    checkpointing: Checkpointing = "none",
    compile: Literal["none", "blocks", "whole"] = "none",
    shard: Callable[[Transformer], None] | None = None,
    vocabulary_multiple: int = 1,
) -> None:
    """Change `network` in place; each step sees what the one before has made.

    The product with the vocabulary is padded to `vocabulary_multiple`, unless its rows are split.

    1. tensor parallelism replaces parameters, so it comes before everything that holds on to them
    2. float8 replaces linear layers, the weights in them stay
    3. activation checkpointing wraps the forward that is then
    4. compiled, block by block (one is compiled and serves them all) or as a whole
    5. sharding hooks around the block: its all-gather stays outside the compiled code, and is not recomputed
    """
    if tensor_mesh is not None:
        split(network, tensor_mesh)
    elif network.head is not None:
        network.head.multiple = vocabulary_multiple
    if float8:
        convert(network)
    for block in network.blocks:
        if checkpointing != "none":
            checkpoint_block(block, checkpointing)
    if compile != "none":
        compile_network(network, compile)
    if shard is not None:
        shard(network)
