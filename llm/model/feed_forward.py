"""The position-wise half of a block."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from llm.model.config import TransformerConfig
from llm.model.initialisation import Linear, residual_std


def relu_squared(hidden: Tensor) -> Tensor:
    """max(x, 0)² (So et al. 2021, arXiv:2109.08668)."""
    return F.relu(hidden).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "swiglu": F.silu,
    "relu_squared": relu_squared,
}


class FeedForward(nn.Module):
    """down(f(up(x))); with swiglu, down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        gated = config.activation == "swiglu"
        self.gate = Linear(config.dim, config.ffn_width, bias=config.bias) if gated else None
        self.up = Linear(config.dim, config.ffn_width, bias=config.bias)
        self.down = Linear(config.ffn_width, config.dim, bias=config.bias, std=residual_std(config))

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.gate is None:
            return self.down(self.activation(self.up(hidden)))
        return self.down(self.activation(self.gate(hidden)) * self.up(hidden))
