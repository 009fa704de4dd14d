"""Multi-head, grouped-query and multi-query attention: one class, as they differ only in the number of key heads."""

from torch import Tensor, nn

from llm.model.cache import LayerCache
from llm.model.config import TransformerConfig
from llm.model.initialisation import Linear
from llm.model.kernel import attend
from llm.model.mask import Mask
from llm.model.norm import build_norm
from llm.model.parametrization import scores_scale
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
        self.scale = scores_scale(config)
        self.query = Linear(config, "dim", "queries", bias=bool(config.bias), role="query")
        self.key = Linear(config, "dim", "keys", bias=bool(config.bias))
        self.value = Linear(config, "dim", "keys", bias=bool(config.bias))
        self.out = Linear(config, "queries", "dim", bias=config.bias is True, role="residual")
        self.query_norm = build_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.key_norm = build_norm(config, self.head_dim) if config.qk_norm else nn.Identity()

    def forward(
        self, hidden: Tensor, mask: Mask, rotation: Rotation | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Hidden [B, T, D] -> [B, T, D]; with a cache, its keys and values come before the new ones."""
        query, key, value = (self._heads(project, hidden) for project in (self.query, self.key, self.value))
        query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        # Norms and rotations may have left fp32 behind, and the kernels want one dtype.
        query, key, value = (heads.to(value.dtype).transpose(1, 2) for heads in (query, key, value))
        if cache is not None:
            key, value = cache.append(key, value)
        return self._attend(query, key, value, mask)

    def _heads(self, project: nn.Module, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, H or G, K]."""
        return project(hidden).unflatten(-1, (-1, self.head_dim))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        """Heads [B, H, T, K] and [B, G, S, K] twice -> [B, T, D]."""
        context = attend(query, key, value, mask, self.dropout if self.training else 0.0, self.scale)
        return self.out(context.transpose(1, 2).flatten(-2))


class CrossAttention(Attention):
    """Attention whose keys and values come from the encoder's hidden states, the memory (Vaswani et al. 2017)."""

    def forward(  # type: ignore[override]  # it has another input
        self, hidden: Tensor, memory: Tensor | None, mask: Mask, cache: LayerCache | None = None
    ) -> Tensor:
        """Hidden [B, T, D], memory [B, S, D] -> [B, T, D]; a cache keeps the memory's keys and values, and from then on
        the memory is not needed."""
        query = self.query_norm(self._heads(self.query, hidden))
        if cache is not None and cache.memory is not None:
            key, value = cache.memory
        else:
            assert memory is not None, "cross-attention without a memory"
            key, value = self.key_norm(self._heads(self.key, memory)), self._heads(self.value, memory)
            key, value = (heads.to(value.dtype).transpose(1, 2) for heads in (key, value))
            if cache is not None:
                cache.memory = key, value
        return self._attend(query.to(value.dtype).transpose(1, 2), key, value, mask)
