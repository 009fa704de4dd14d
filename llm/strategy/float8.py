"""Matrix products of the blocks in 8-bit floating point (Micikevicius et al. 2022, arXiv:2209.05433), by torchao.

Inputs, weights and gradients are each scaled by their largest value, cast, multiplied, and summed in higher precision.
Weights, their names and the checkpoints stay what they are.
"""

from __future__ import annotations

import importlib.util
from types import MethodType
from typing import Any

import torch

from llm.model import Transformer, TransformerConfig
from llm.model.initialisation import Linear

# Casting costs about as much as it saves where matrices are small: published runs below a billion parameters were no
# faster or slower.
MIN_PARAMETERS = 1_000_000_000
_MULTIPLE = 16  # what the kernels ask of both widths of a matrix
_CAPABILITY = (8, 9)


def convert(network: Transformer, *, emulate: bool = False) -> None:
    """Make the linear layers of the blocks multiply in float8, in place; not the head, whose rounding the loss sees.

    Args:
        network: on any device, the meta device too.
        emulate: cast, but multiply in higher precision: for devices without float8, to see what rounding does.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(emulate=emulate)
    for block in network.blocks:
        plain = {name: module for name, module in block.named_modules() if isinstance(module, Linear)}
        convert_to_float8_training(block, config=config)
        for name, module in plain.items():
            converted: Any = block.get_submodule(name)
            # It has forgotten where our weights start, and how fast they go.
            for kept in ("std", "truncated", "base_shape"):
                setattr(converted, kept, getattr(module, kept))
            converted.reset_parameters = MethodType(Linear.reset_parameters, converted)


def problems(config: TransformerConfig, accelerator: str, n_shares: int = 1) -> list[str]:
    """One line for each reason why float8 makes no sense for a model of `config`, here."""
    found = []
    if accelerator == "cpu":
        found.append("strategy.float8: true - a CPU has no such products - set it to false")
    elif torch.cuda.is_available() and torch.cuda.get_device_capability() < _CAPABILITY:
        name = torch.cuda.get_device_name()
        found.append(f"strategy.float8: true - needs compute capability 8.9, which {name} has not - set it to false")
    if importlib.util.find_spec("torchao") is None:
        found.append("strategy.float8: true - needs torchao - pip install 'llm-on-lightning[float8]'")
    if n_shares > 1:
        found.append(
            "strategy.float8: true - is not for matrices that processes share - set strategy.tensor_parallel_size to 1"
        )
    widths = {
        "dim": config.dim,
        "n_heads x model.head_dim": config.n_heads * config.head_width,
        "n_kv_heads x model.head_dim": config.kv_heads * config.head_width,
        "ffn_dim": config.ffn_width,
    }
    found += [
        f"strategy.float8: true - needs multiples of {_MULTIPLE}, and model.{key} is {width} - change it, or set "
        "strategy.float8 to false"
        for key, width in widths.items()
        if width % _MULTIPLE
    ]
    n_parameters = _n_parameters(config)
    if n_parameters < MIN_PARAMETERS:
        found.append(
            f"strategy.float8: true - is slower or no faster below {MIN_PARAMETERS:,} parameters, and this model has "
            f"{n_parameters:,} - set it to false"
        )
    return found


def _n_parameters(config: TransformerConfig) -> int:
    with torch.device("meta"):
        return Transformer(config).n_parameters()
