"""Where weights start: one rule per family, carried by the layers themselves. Biases start at 0, norms at 1.

gpt2     normal, standard deviation 0.02; the projections of a block that write into the residual stream
         0.02 / sqrt(2 n_layers), "scaled by 1/√N where N is the number of residual layers" (Radford et al. 2019,
         section 2.3), so that the sum of all contributions does not grow with depth. Megatron's rule too (Shoeybi et
         al. 2019)
llama    normal, standard deviation 0.02 everywhere (`initializer_range` of the released Llama configurations)
bert     the same, cut off at two deviations (`create_initializer` of Devlin et al.'s released code)
t5       normal; embeddings 1, matrices 1 / sqrt(inputs), queries 1 / sqrt(inputs · head_dim), since its scores are not
         divided by sqrt(head_dim) (Raffel et al. 2020; Mesh TensorFlow's and T5X's layers)
vaswani  normal; embeddings 1 / sqrt(dim), which sqrt(dim) multiplies, matrices sqrt(2 / (inputs + outputs)) (Glorot and
         Bengio 2010, with the normal distribution; Vaswani et al. 2017 in tensor2tensor)

These are of a network of model.base_dim, where that is given: how they go on from there says llm.model.parametrization.

Each layer knows its own deviation, so `reset_parameters` needs no knowledge of the model around it: a network can be
built on the meta device, spread over machines, and only then given its numbers.
"""

import math
from collections.abc import Callable, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from torch import Tensor, nn

from llm.model.config import TransformerConfig
from llm.model.parametrization import Width, base_shape, base_width, deviation_factor, width

STD = 0.02
Role = Literal["hidden", "query", "residual", "embedding"]


def deviation(config: TransformerConfig, n_in: float, n_out: float, role: Role = "hidden") -> float:
    """Standard deviation of a matrix of n_in inputs and n_out outputs; an embedding gives its rows' width as n_in."""
    if config.initialisation == "t5":
        n_inputs = {"embedding": 1, "query": n_in * config.base_head_width}.get(role, n_in)
        return 1 / math.sqrt(n_inputs)
    if config.initialisation == "vaswani":
        return 1 / math.sqrt(n_in) if role == "embedding" else math.sqrt(2 / (n_in + n_out))
    return STD / math.sqrt(2 * config.n_layers) if config.initialisation == "gpt2" and role == "residual" else STD


class Linear(nn.Linear):
    """A linear layer that starts as the family's do: normal with deviation `std`; its bias, where it has one, at 0.

    Of its `base_shape` llm.model.parametrization tells.
    """

    base_shape: tuple[float, float] | None

    def __init__(
        self, config: TransformerConfig, n_in: Width, n_out: Width, *, bias: bool, role: Role = "hidden"
    ) -> None:
        # Before the parent's constructor, which calls reset_parameters.
        std = deviation(config, base_width(config, n_in), base_width(config, n_out), role)
        self.std, self.truncated = std * deviation_factor(config, n_in, n_out), _truncated(config)
        super().__init__(width(config, n_in), width(config, n_out), bias=bias)
        self.base_shape = base_shape(config, n_in, n_out)

    def reset_parameters(self) -> None:
        _draw(self.weight, self.std, self.truncated)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """A table of vectors that starts as the family's do: normal with deviation `std`."""

    def __init__(self, config: TransformerConfig, n_rows: int, dim: int, role: Role = "embedding") -> None:
        # Before the parent's constructor, which calls reset_parameters.
        self.std, self.truncated = deviation(config, base_width(config, "dim"), n_rows, role), _truncated(config)
        super().__init__(n_rows, dim)

    def reset_parameters(self) -> None:
        _draw(self.weight, self.std, self.truncated)


def _truncated(config: TransformerConfig) -> bool:
    return config.initialisation == "bert"


def _draw(weight: Tensor, std: float, truncated: bool) -> None:
    if truncated:
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    else:
        nn.init.normal_(weight, std=std)


Within = Callable[[nn.Module, Set[str]], AbstractContextManager[object]]


def initialise(model: nn.Module, within: Within = lambda module, names: nullcontext()) -> None:
    """Draw every weight anew from torch's generator, in the order of a direct build.

    After a build on the meta device and `to_empty`, the same seed gives the same weights as a direct build. A module
    that owns parameters but has no `reset_parameters` would keep uninitialised memory: that is a TypeError. Each module
    is drawn inside `within(module, names of its parameters that are drawn)`: not of those that are another's (the
    weight of a tied head).
    """
    drawn: set[int] = set()
    for name, module in model.named_modules():
        own = {key: id(p) for key, p in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
        if set(own.values()) <= drawn:
            continue
        reset = getattr(module, "reset_parameters", None)
        if reset is None:
            raise TypeError(f"{name} ({type(module).__name__}) owns parameters or buffers but has no reset_parameters")
        with within(module, {key for key, identity in own.items() if identity not in drawn}):
            reset()
        drawn |= set(own.values())
