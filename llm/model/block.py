"""One layer."""

from torch import Tensor, nn

from llm.model.attention import Attention
from llm.model.cache import LayerCache
from llm.model.config import TransformerConfig
from llm.model.feed_forward import FeedForward
from llm.model.mask import Mask
from llm.model.norm import build_norm
from llm.model.position import Rotation


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream.

    The unit that strategies compile, checkpoint and spread over devices.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_position == "pre"
        self.attention_norm = build_norm(config, config.dim)
        self.attention = Attention(config)
        self.feed_forward_norm = build_norm(config, config.dim)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(
        self, hidden: Tensor, mask: Mask, rotation: Rotation | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.norm_first:
            hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), mask, rotation, cache))
            return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))
        hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, mask, rotation, cache)))
        return self.feed_forward_norm(hidden + self.dropout(self.feed_forward(hidden)))
