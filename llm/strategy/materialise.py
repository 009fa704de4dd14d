"""From the meta device to this process's part of every weight, with the numbers of a build in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Set

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llm.checkpoint import place
from llm.model import Transformer, initialise


def materialise(network: Transformer, device: torch.device) -> None:
    """Give a network on the meta device memory and its initial weights.

    Every process draws the whole of one module after the other and keeps its part: the weights do not depend on how
    many processes there are, nothing is sent, and no process ever holds more than one whole module.

    Raises:
        TypeError: naming a module that cannot draw its own parameters.
    """
    network.to_empty(device=device)
    initialise(network, _drawn_whole)


@contextlib.contextmanager
def _drawn_whole(module: nn.Module, names: Set[str]) -> Generator[None]:
    """Inside, the module's parameters `names` are whole tensors; afterwards each process has its part of what they
    became."""
    own = module.named_parameters(recurse=False)
    spread = {name: p for name, p in own if name in names and isinstance(p, DTensor)}
    for name, parameter in spread.items():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        module.register_parameter(name, nn.Parameter(whole))
    yield
    for name, parameter in spread.items():
        drawn = module.get_parameter(name)
        module.register_parameter(name, parameter)
        with torch.no_grad():
            parameter.copy_(place(drawn.detach(), parameter))
