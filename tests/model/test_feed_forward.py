"""Activations by their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from llm.model.feed_forward import FeedForward
from llm.model.feed_forward import gelu_tanh as ours_gelu


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("activation", "formula"),
    [("gelu", gelu), ("gelu_tanh", gelu_tanh), ("relu_squared", lambda x: torch.where(x > 0, x * x, 0.0))],
)
def test_plain(config, activation, formula, bias):
    layer = scattered(FeedForward(config(activation=activation, bias=bias)))
    x = torch.randn(2, 3, 32)
    inner = x @ layer.up.weight.T + (layer.up.bias if bias else 0)
    expected = formula(inner) @ layer.down.weight.T + (layer.down.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_gelu_tanh_that_keeps_its_gate():
    """In float64 by its formula, second decimals and all; far out, where it is 0 or the identity, without overflow."""
    x = torch.cat([torch.randn(1000, dtype=torch.double) * 3, torch.tensor([-1e4, -40.0, 0.0, 40.0, 1e4]).double()])
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    torch.testing.assert_close(ours_gelu(mine), gelu_tanh(theirs), rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(x)
    gradients = [torch.autograd.grad(f(x), x, weights)[0] for f, x in ((ours_gelu, mine), (gelu_tanh, theirs))]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_gelu_tanh_in_16_bits_is_rounded_once():
    """No farther from the truth than torch's own kernel, forward and backward."""
    torch.manual_seed(0)
    x, weights = (torch.randn(20_000).bfloat16() for _ in range(2))
    true = both(gelu_tanh, x.double(), weights.double())
    ours = both(ours_gelu, x, weights)
    torchs = both(lambda x: F.gelu(x, approximate="tanh"), x, weights)
    for mine, theirs, exact in zip(ours, torchs, true, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - exact).abs().mean() <= (theirs - exact).abs().mean() * 1.01


def both(function, x, weights):
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, weights)[0]


def test_swiglu(config):
    layer = scattered(FeedForward(config(activation="swiglu")))
    x = torch.randn(2, 3, 32)
    gate = x @ layer.gate.weight.T
    expected = (gate * torch.sigmoid(gate) * (x @ layer.up.weight.T)) @ layer.down.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def scattered(layer):
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer
