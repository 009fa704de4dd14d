"""One layer."""

from torch import Tensor, nn

from llm.model.attention import Attention, CrossAttention
from llm.model.cache import LayerCache
from llm.model.config import TransformerConfig
from llm.model.feed_forward import FeedForward
from llm.model.mask import Mask
from llm.model.norm import build_norm
from llm.model.position import Rotation


class Block(nn.Module):
    """Attention, in a decoder with an encoder cross-attention, then feed-forward, each added to the residual stream.

    The unit that strategies compile, checkpoint and spread over devices.

    Args:
        config: of the whole network.
        cross: whether it looks at a memory.
        attention_norm: false where its input is normalised already.
    """

    def __init__(self, config: TransformerConfig, *, cross: bool = False, attention_norm: bool = True) -> None:
        super().__init__()
        self.norm_first = config.norm_position == "pre"
        self.attention_norm = build_norm(config, config.dim) if attention_norm else nn.Identity()
        self.attention = Attention(config)
        self.cross_attention_norm = build_norm(config, config.dim) if cross else None
        self.cross_attention = CrossAttention(config) if cross else None
        self.feed_forward_norm = build_norm(config, config.dim)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(
        self,
        hidden: Tensor,
        mask: Mask,
        rotation: Rotation | None = None,
        cache: LayerCache | None = None,
        memory: Tensor | None = None,
        memory_mask: Mask | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; memory [B, S, D]."""
        drop = self.dropout
        if self.norm_first:
            hidden = hidden + drop(self.attention(self.attention_norm(hidden), mask, rotation, cache))
            if self.cross_attention is not None and self.cross_attention_norm is not None:
                query = self.cross_attention_norm(hidden)
                hidden = hidden + drop(self.cross_attention(query, memory, memory_mask, cache))
            return hidden + drop(self.feed_forward(self.feed_forward_norm(hidden)))
        hidden = self.attention_norm(hidden + drop(self.attention(hidden, mask, rotation, cache)))
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            hidden = self.cross_attention_norm(hidden + drop(self.cross_attention(hidden, memory, memory_mask, cache)))
        return self.feed_forward_norm(hidden + drop(self.feed_forward(hidden)))
