"""Where weights start: one rule per family, carried by the layers themselves.

gpt2   normal, standard deviation 0.02; biases 0; the two projections of a block that write into the residual stream
       0.02 / sqrt(2 n_layers), "scaled by 1/√N where N is the number of residual layers" (Radford et al. 2019, section
       2.3), so that the sum of all contributions does not grow with depth.
llama  normal, standard deviation 0.02 everywhere, biases 0 (`initializer_range` of the released Llama configurations).

Each layer knows its own deviation, so `reset_parameters` needs no knowledge of the model around it: a network can be
built on the meta device, spread over machines, and only then given its numbers.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from llm.model.config import TransformerConfig

STD = 0.02


def residual_std(config: TransformerConfig) -> float:
    """Deviation of the projections that write into the residual stream."""
    return STD / math.sqrt(2 * config.n_layers) if config.initialisation == "gpt2" else STD


class Linear(nn.Linear):
    """A linear layer that starts normal with deviation `std`; its bias, where it has one, at 0."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool, std: float = STD) -> None:
        self.std = std  # before the parent's constructor, which calls reset_parameters
        super().__init__(n_in, n_out, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """A table of vectors that starts normal with deviation `std`."""

    def __init__(self, n_rows: int, dim: int, *, std: float = STD) -> None:
        self.std = std  # before the parent's constructor, which calls reset_parameters
        super().__init__(n_rows, dim)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


def initialise(model: nn.Module, within: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext) -> None:
    """Draw every weight anew from torch's generator, in the order of a direct build.

    After a build on the meta device and `to_empty`, the same seed gives the same weights as a direct build. A module
    that owns parameters but has no `reset_parameters` would keep uninitialised memory: that is a TypeError. Each module
    is drawn inside `within(module)`; one whose weights are all another's (a tied head) is not drawn.
    """
    drawn: set[int] = set()
    for name, module in model.named_modules():
        own = {id(tensor) for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))}
        if own <= drawn:
            continue
        reset = getattr(module, "reset_parameters", None)
        if reset is None:
            raise TypeError(f"{name} ({type(module).__name__}) owns parameters or buffers but has no reset_parameters")
        with within(module):
            reset()
        drawn |= own
