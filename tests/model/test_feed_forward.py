"""Activations by their formulas."""

import math

import pytest
import torch

from llm.model.feed_forward import FeedForward


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
