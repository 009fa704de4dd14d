"""The position-wise half of a block."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llm.model.config import TransformerConfig
from llm.model.initialisation import Linear


def relu_squared(hidden: Tensor) -> Tensor:
    """max(x, 0)² (So et al. 2021, arXiv:2109.08668), as a product: forward and backward of square() took half as long
    again."""
    return hidden * F.relu(hidden)


class TanhGelu(torch.autograd.Function):
    """0.5 x (1 + tanh(u / 2)) as x σ(u), u = 2 sqrt(2/π) (x + 0.044715 x³), for CPUs.

    Of 16 bits it computes in 32, as torch's kernel does, which takes a tanh, and a slow one, in the forward and another
    in the backward: 6.0 ms for 1,024 x 768 on a core with AVX2, where these passes take 2.7.
    """

    LINEAR, CUBIC = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        """Any shape."""
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        gate = TanhGelu._odd(x, TanhGelu.CUBIC).sigmoid_()
        ctx.save_for_backward(hidden, gate)
        return (x * gate).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # of one output
        """gradient · (σ + x σ (1 - σ) u')."""
        hidden, gate = ctx.saved_tensors
        x = hidden.to(gate.dtype)
        slope = TanhGelu._odd(x, 3 * TanhGelu.CUBIC)  # x u'
        return torch.ops.aten.sigmoid_backward(slope, gate).add_(gate).mul_(gradient).to(hidden.dtype)

    @staticmethod
    def _odd(x: Tensor, cubic: float) -> Tensor:
        """LINEAR x + cubic x³, in two passes."""
        return torch.addcmul(x.new_full((), TanhGelu.LINEAR), x, x, value=cubic).mul_(x)


def gelu_tanh(hidden: Tensor) -> Tensor:
    """GELU by its approximation with a tanh (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    if hidden.device.type == "cpu" and hidden.requires_grad and not torch.compiler.is_compiling():
        result: Tensor = TanhGelu.apply(hidden)
        return result
    return F.gelu(hidden, approximate="tanh")


# A gated activation is named after what its gate goes through.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "relu_squared": relu_squared,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": gelu_tanh,
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
