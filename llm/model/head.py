"""From hidden states to scores."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.model.config import TransformerConfig
from llm.model.feed_forward import ACTIVATIONS
from llm.model.initialisation import Linear
from llm.model.norm import build_norm


class Head(Linear):
    """Hidden states to the vocabulary. Tied, it borrows its weight: none is made or reset.

    In training the product is that of a vocabulary rounded up to a `multiple`, by rows of zeros whose scores nobody
    wants: on a GPU, kernels for 16-bit numbers want rows of scores that begin at round addresses, and those of GPT-2's
    50,257 tokens do not. The weight itself is never padded, so that nothing else has to know; the copy is the one that
    autocast makes anyway. To generate one token it would cost more than the product.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        self.tied = config.tie_embeddings
        self.multiple = 1  # a strategy for GPUs sets it
        if self.tied:
            with torch.device("meta"):
                super().__init__(config, "dim", vocab_size, bias=False)
            self.base_shape = None  # the weight is an embedding
            if config.head_bias:
                self.bias = nn.Parameter(torch.zeros(vocab_size))
        else:
            super().__init__(config, "dim", vocab_size, bias=config.head_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[.., D] -> [.., V], or more in training where `multiple` says so."""
        n_rows = self.weight.shape[0]
        n_more = -n_rows % self.multiple
        if n_more == 0 or not self.training:
            return super().forward(hidden)
        bias = None if self.bias is None else F.pad(self.bias, (0, n_more))
        return F.linear(hidden, F.pad(self.weight, (0, 0, 0, n_more)), bias)

    def reset_parameters(self) -> None:
        if not self.tied:
            super().reset_parameters()
        elif self.bias is not None:
            nn.init.zeros_(self.bias)


class Transform(nn.Module):
    """What an encoder's hidden states go through before the head: norm(f(dense(x))) (Devlin et al. 2019)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dense = Linear(config, "dim", "dim", bias=config.bias is True)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = build_norm(config, config.dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """[.., D] -> [.., D]."""
        return self.norm(self.activation(self.dense(hidden)))
