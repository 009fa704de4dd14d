"""Trading computation for memory: what a block's forward computed is computed again in its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

Checkpointing = Literal["none", "full", "selective"]

_aten = torch.ops.aten
# The products, whose results cost most to make: they are kept, and all that lies between them is made again.
_KEPT: list[Any] = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


def checkpoint_block(block: nn.Module, checkpointing: Literal["full", "selective"]) -> None:
    """Make `block` keep only its input (full; Chen et al. 2016, arXiv:1604.06174), or also the results of its matrix
    products and attention (selective; Korthikanti et al. 2022, arXiv:2205.05198), in place.

    Names of parameters stay as they are: `forward` is replaced, not the module.
    """
    compute: Callable[..., Any] = block.forward
    options: dict[str, Any] = {"use_reentrant": False}
    if checkpointing == "selective":
        options["context_fn"] = _contexts

    def forward(*inputs: Any, **named: Any) -> Any:  # a function, as the compiler does not look into a partial
        return checkpoint(compute, *inputs, **named, **options)

    block.forward = forward


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_KEPT)
