"""The kernels of attention, and which of them a mask asks for."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from llm.model.mask import Mask, Runs


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout: float, scale: float | None) -> Tensor:
    """softmax(scale · q kᵀ) v, per head, over what `mask` lets each query see; scale None: 1 / sqrt(K).

    Query [B, H, T, K], key and value [B, G, S, K], where H / G heads share one -> [B, H, T, K].
    """
    if query.device.type == "cpu" and query.dtype is torch.bfloat16:
        # Of torch 2.13's kernel for CPUs the backward takes three times as long in bfloat16 as in float32: 12.8 and 4.1
        # ms for 8 x 6 heads of 128 x 32; the forward 2.3 and 1.9.
        with torch.autocast("cpu", enabled=False):
            return attend(query.float(), key.float(), value.float(), mask, dropout, scale).bfloat16()
    if mask.blocks is not None:
        assert dropout == 0.0, "flex_attention knows no dropout: such a model takes dense masks"
        return _by_block(query, key, value, mask.blocks, scale)
    if mask.runs is not None:
        return _by_run(query, key, value, mask, mask.runs, dropout, scale)
    visible = mask.visible
    if visible is not None and visible.is_floating_point():
        visible = visible.to(query.dtype)
    grouped = query.shape[1] != key.shape[1]
    if grouped and visible is not None:
        # On CUDA no fused kernel takes grouped heads with a mask: it would fall to the one that keeps all scores.
        n_queries = query.shape[1] // key.shape[1]
        key, value = (heads.repeat_interleave(n_queries, dim=1) for heads in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visible,
        dropout_p=dropout,
        is_causal=mask.causal,
        scale=scale,
        enable_gqa=grouped,
    )


def _by_block(query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask, scale: float | None) -> Tensor:
    """flex_attention (Dong et al. 2024, arXiv:2412.05496), which is a kernel only once it is compiled: inside a
    compiled block it is part of that."""
    grouped = query.shape[1] != key.shape[1]
    if torch.compiler.is_compiling():
        return flex_attention(query, key, value, block_mask=blocks, scale=scale, enable_gqa=grouped)
    return _compiled_flex()(query, key, value, block_mask=blocks, scale=scale, enable_gqa=grouped)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def _by_run(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, runs: Runs, dropout: float, scale: float | None
) -> Tensor:
    """Each run of queries over the run of keys that it sees; 0 where it sees none.

    Split and not sliced: the gradient of a slice is as large as what it was cut from, that of all pieces one tensor.
    """
    plain = Mask(None, mask.causal)
    rows = []
    for number, (q, k, v) in enumerate(zip(query.split(1), key.split(1), value.split(1), strict=True)):
        keys, values = k.split(runs.keys[number], dim=2), v.split(runs.keys[number], dim=2)
        parts = zip(q.split(runs.queries[number], dim=2), runs.seen[number], strict=True)
        context = [
            torch.zeros_like(part) if seen is None else attend(part, keys[seen], values[seen], plain, dropout, scale)
            for part, seen in parts
        ]
        rows.append(torch.cat(context, dim=2))
    return torch.cat(rows)
