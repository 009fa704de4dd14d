"""Trading computation for memory: what a block's forward computed is computed again in its backward.

With R = ffn_dim / dim and g = n_kv_heads / n_heads, a block whose norms come first keeps so many hidden states
[rows, length, dim] from its forward to its backward, beside the mask and numbers per row and head:

    none       10 + 4R       three for each rms norm; queries, keys, values and what attention makes of them; gate, up,
                             f(gate) and the product. With layer norms and no gate 8 + 2R; R more of gelu_tanh on a CPU
    selective  4 + 2g + 2R   its input; queries, keys, values and what attention makes of them, before the projection
                             and after it; gate and up. 4 + 2g + R without a gate
    full       1             its input

which is 24, 11.5 and 1 at the shape of Llama 3 8B. Selective computes no matrix product again, full all but the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = Literal["none", "full", "selective"]

_aten = torch.ops.aten
# The products, whose results cost most to make: they are kept, and all that lies between them is made again.
_LINEAR: set[Any] = {_aten.mm.default, _aten.addmm.default, _aten._scaled_mm.default}
_KEPT: set[Any] = {
    *_LINEAR,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def checkpoint_block(block: nn.Module, checkpointing: Literal["full", "selective"]) -> None:
    """Make `block` keep only its input (full; Chen et al. 2016, arXiv:1604.06174), or also the results of its matrix
    products and attention (selective; Korthikanti et al. 2022, arXiv:2205.05198), in place.

    Names of parameters stay as they are: `forward` is replaced, not the module.
    """
    compute: Callable[..., Any] = block.forward
    options: dict[str, Any] = {"use_reentrant": False}
    if checkpointing == "selective":
        n_linear = sum(isinstance(module, nn.Linear) for module in block.modules())
        needless = n_linear if getattr(block, "norm_first", False) else None
        options["context_fn"] = lambda: _contexts(needless)

    def forward(*inputs: Any, **named: Any) -> Any:  # a function, as the compiler does not look into a partial
        return checkpoint(compute, *inputs, **named, **options)

    block.forward = forward


def _contexts(needless: int | None) -> Any:
    """For one forward and its repetition.

    Args:
        needless: which of the linear layers' products is not kept, counted from 1: the last one of a block, where it is
            only added to the residual stream, no gradient asks for.
    """
    counts = {False: 0, True: 0}

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if operator in _LINEAR:
            counts[context.is_recompute] += 1
            if counts[context.is_recompute] == needless:
                return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
