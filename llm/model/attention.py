"""Multi-head, grouped-query and multi-query attention: one class, as they differ only in the number of key heads."""

import torch.nn.functional as F
from torch import Tensor, nn

from llm.model.cache import LayerCache
from llm.model.config import TransformerConfig
from llm.model.initialisation import Linear, residual_std
from llm.model.mask import Mask
from llm.model.norm import build_norm
from llm.model.position import Rotation, rotate


class Attention(nn.Module):
    """softmax(q kᵀ / sqrt(head_dim)) v, per head, over what the mask lets each query see.

    The number of heads is read from the width of the projections, never stored: split by output rows, the same
    module computes a part of the heads.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_dim = config.head_width
        self.dropout = config.dropout
        query_dim, key_dim = config.n_heads * self.head_dim, config.kv_heads * self.head_dim
        self.query = Linear(config.dim, query_dim, bias=config.bias)
        self.key = Linear(config.dim, key_dim, bias=config.bias)
        self.value = Linear(config.dim, key_dim, bias=config.bias)
        self.out = Linear(query_dim, config.dim, bias=config.bias, std=residual_std(config))
        self.query_norm = build_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.key_norm = build_norm(config, self.head_dim) if config.qk_norm else nn.Identity()

    def forward(
        self, hidden: Tensor, mask: Mask, rotation: Rotation | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Hidden [B, T, D] -> [B, T, D]; with a cache, its keys and values come before the new ones."""
        query, key, value = (
            project(hidden).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value)
        )  # [B, T, H, K], [B, T, G, K] twice
        query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        # Norms and rotations may have left fp32 behind, and the kernels want one dtype.
        query, key, value = (heads.to(value.dtype).transpose(1, 2) for heads in (query, key, value))
        if cache is not None:
            key, value = cache.append(key, value)
        grouped = query.shape[1] != key.shape[1]
        if grouped and mask.visible is not None:
            # On CUDA no fused kernel takes grouped heads with a mask: it would fall to the one that keeps all scores.
            n_queries = query.shape[1] // key.shape[1]
            key, value = (heads.repeat_interleave(n_queries, dim=1) for heads in (key, value))
            grouped = False
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask.visible,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask.causal,
            enable_gqa=grouped,
        )
        return self.out(context.transpose(1, 2).flatten(-2))
