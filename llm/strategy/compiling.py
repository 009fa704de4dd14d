"""Code made for this model: torch.compile traces Python into graphs and fuses what lies between the matrix products."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch

from llm.model import Transformer

Compile = Literal["none", "blocks", "whole", "auto"]

# Published gains are for whole networks up to about this size and for single blocks above it, where tracing and
# compiling all layers one after the other takes minutes and what lies between blocks is a small part.
WHOLE_UP_TO = 500_000_000


def resolve(
    compile: Compile, network: Transformer, device: torch.device, *, spread: bool = False
) -> Literal["none", "blocks", "whole"]:
    """What auto means: nothing on a CPU, where it gained nothing; the whole network where it is small; else its blocks,
    as always where they are `spread` over processes, whose gathering lies between them and cannot be traced.
    """
    if compile != "auto":
        return compile
    if device.type == "cpu":
        return "none"
    return "blocks" if spread or network.n_parameters() > WHOLE_UP_TO else "whole"


def compile_network(network: Transformer, compile: Literal["blocks", "whole"]) -> None:
    """In place, when it is first called: names of parameters stay. Blocks of equal shape share what is made of one."""
    if compile == "whole":
        network.compile()
    else:
        for block in network.blocks:
            block.compile()


def quicken_loss(objective: Any, device: torch.device, *, compiled: bool) -> None:
    """Scores over the vocabulary and their loss, in place: eagerly, a softmax in float32 writes the largest tensor of a
    step several times. On a GPU there are kernels for it; elsewhere it is one graph if the network is `compiled`.

    How many positions are scored changes from batch to batch where only some are predicted, and at the end of what is
    scored in parts; that is compiled once for every number.
    """
    objective.fused = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if compiled and not objective.fused:
        varies = objective.network.config.family == "encoder" or objective.logits_at_once is not None
        objective._nats = torch.compile(objective._nats, dynamic=True if varies else None)
