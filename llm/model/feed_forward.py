"""The position-wise half of a block."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from llm.model.config import TransformerConfig
from llm.model.initialisation import Linear


def relu_squared(hidden: Tensor) -> Tensor:
    """max(x, 0)² (So et al. 2021, arXiv:2109.08668), as a product: forward and backward of square() took half as long
    again."""
    return hidden * F.relu(hidden)


# A gated activation is named after what its gate goes through.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "relu_squared": relu_squared,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
}


class FeedForward(nn.Module):
    """down(f(up(x))); gated, down(f(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        bias = config.bias is True
        self.gate = Linear(config, "dim", "ffn", bias=bias) if config.gated else None
        self.up = Linear(config, "dim", "ffn", bias=bias)
        self.down = Linear(config, "ffn", "dim", bias=bias, role="residual")

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.gate is None:
            return self.down(self.activation(self.up(hidden)))
        return self.down(self.activation(self.gate(hidden)) * self.up(hidden))
