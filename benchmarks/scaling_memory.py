"""Bytes that one device must hold, for the tables of scaling: a formula, where `python -m llm plan` traces a step.

Weights, gradients and optimizer state are counted; activations are estimated.
"""

from __future__ import annotations

import math
from typing import Literal

from llm.plan.traffic import Layout, Model, held

_MOMENTS = 8  # AdamW's two, float32
_MASTER = 4  # a weight as the optimizer sees it
_GRADIENT = 4
_SCORED = 10  # a score in bfloat16, and in float32 with its gradient


def memory_bytes(
    model: Model,
    layout: Layout,
    checkpointing: Literal["none", "full"] = "none",
    logits_at_once: int | None = None,
) -> float:
    """At the worst moment of a step.

    State: 16 bytes of each parameter that the process keeps (master weight, gradient, moments); whole gradients if they
    are added up over several micro-batches; and gathered weights: what is around the blocks and two blocks, or all
    with reshard_after_forward=false. DDP computes in bfloat16 copies of all weights where weight_bytes is 2.
    """
    kept = held(layout, model.shapes) / layout.n_shards
    whole = held(layout, model.shapes)
    state = (_MASTER + _GRADIENT + _MOMENTS) * kept
    blocks = [held(layout, block) for block in model.blocks]
    if layout.n_shards > 1:
        gathered = held(layout, model.around) + (2 * max(blocks) if layout.reshard_after_forward else sum(blocks))
        state += layout.weight_bytes * gathered
        if layout.n_micro_batches > 1:
            state += _GRADIENT * (whole - kept)
    elif layout.weight_bytes == 2:
        state += 2 * whole
    scored = min(layout.micro_batch_tokens, logits_at_once or layout.micro_batch_tokens)
    return state + _activations(model, layout, checkpointing) + _SCORED * scored * model.vocab_size


def _activations(model: Model, layout: Layout, checkpointing: Literal["none", "full"]) -> float:
    """What a backward needs of each token: of a block the outputs of its products, the inputs of the two that are no
    norm's output, and four of the residual's width (two norms, in and out); with recomputation the block's input, and
    one block whole. About Korthikanti et al. 2022 (arXiv:2205.05198) without scores, which flash attention has not.
    """
    per_token = []
    for block in model.blocks:
        matrices = {name: shape for name, shape in block.items() if len(shape) == 2}
        outputs = sum(shape[0] for shape in matrices.values())
        inputs = sum(shape[1] for name, shape in matrices.items() if name.endswith(("out.weight", "down.weight")))
        per_token.append(4 * model.dim + (outputs + inputs) / layout.tensor_size)
    kept = sum(per_token) if checkpointing == "none" else model.dim * len(per_token) + max(per_token)
    return math.ceil(layout.weight_bytes * layout.micro_batch_tokens * kept)
