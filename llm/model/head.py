"""From hidden states to scores."""

import torch
from torch import Tensor, nn

from llm.model.config import TransformerConfig
from llm.model.feed_forward import ACTIVATIONS
from llm.model.initialisation import Linear, deviation, linear
from llm.model.norm import build_norm


class Head(Linear):
    """Hidden states to the vocabulary. Tied, it borrows its weight: none is made or reset."""

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        self.tied = config.tie_embeddings
        std, truncated = deviation(config, config.dim, vocab_size), config.initialisation == "bert"
        if self.tied:
            with torch.device("meta"):
                super().__init__(config.dim, vocab_size, bias=False, std=std, truncated=truncated)
            if config.head_bias:
                self.bias = nn.Parameter(torch.zeros(vocab_size))
        else:
            super().__init__(config.dim, vocab_size, bias=config.head_bias, std=std, truncated=truncated)

    def reset_parameters(self) -> None:
        if not self.tied:
            super().reset_parameters()
        elif self.bias is not None:
            nn.init.zeros_(self.bias)


class Transform(nn.Module):
    """What an encoder's hidden states go through before the head: norm(f(dense(x))) (Devlin et al. 2019)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dense = linear(config, config.dim, config.dim, bias=config.bias is True)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = build_norm(config, config.dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """[.., D] -> [.., D]."""
        return self.norm(self.activation(self.dense(hidden)))
