"""The whole network, from tokens to hidden states to logits."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from llm.model.block import Block
from llm.model.cache import Cache
from llm.model.config import TransformerConfig
from llm.model.initialisation import Embedding, Linear
from llm.model.mask import Mask, causal_mask, document_mask
from llm.model.norm import build_norm
from llm.model.position import LearnedPosition, Rotation, SinusoidalPosition, build_rotation


class Transformer(nn.Module):
    """A decoder. `model(tokens)` gives hidden states, `model.logits(hidden)` the scores of the vocabulary: apart, since
    the logits are by far the largest tensor of a step and an objective may want them for some tokens only, or in parts.

    Raises ValueError if the configuration has no vocabulary size.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError(
                "model.vocab_size is null: it must be known before a network is built; "
                "set it, or take it from the tokenizer with dataclasses.replace(config, vocab_size=…)"
            )
        self.config = config
        self.embed = Embedding(config.vocab_size, config.dim)
        self.position: nn.Module | None = None
        if config.position == "learned":
            self.position = LearnedPosition(config)
        elif config.position == "sinusoidal":
            self.position = SinusoidalPosition()
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        # Post-norm blocks end in a norm of their own.
        self.norm = build_norm(config, config.dim) if config.norm_position == "pre" else nn.Identity()
        self.head = Head(config.dim, config.vocab_size, tied=config.tie_embeddings)
        self.tie()

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states after the last norm.

        tokens     int64 [B, T]
        documents  int64 [B, T], 1, 2, … per row, 0 = padding: a token sees only its own document. None: one document
        positions  int64 [B, T], None: 0, 1, … along the row (or on from the cache)
        cache      what came before; `tokens` are the new ones, and are added to it

        Returns [B, T, D]. Raises ValueError if the tokens reach beyond learned positions or the cache.
        """
        n_past = 0 if cache is None else cache.length
        self._check_length(n_past + tokens.shape[1], cache)
        if positions is None:
            positions = torch.arange(n_past, n_past + tokens.shape[1], device=tokens.device)
        hidden = self.embed(tokens)
        if self.position is not None:
            hidden = self.position(hidden, positions)
        hidden = self.dropout(hidden)
        rotation = self._rotation(positions)
        mask = self._mask(tokens, documents, cache)
        for i, block in enumerate(self.blocks):
            hidden = block(hidden, mask, rotation, None if cache is None else cache.layers[i])
        return self.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the vocabulary: [.., D] -> [.., V]."""
        return self.head(hidden)

    def tie(self) -> None:
        """Make the head's weight the embedding's again, where the configuration ties them, after one was replaced."""
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    def n_parameters(self) -> int:
        """Weights and biases, a tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def matmul_flops(self, batch: int, length: int) -> int:
        """FLOPs of all matrix products in one forward, logits of every token included; backward does twice as many.

        A multiply-add counts 2, and attention is counted in full: what is masked is computed (equal to
        torch.utils.flop_counter.FlopCounterMode under sdpa_kernel(MATH)). For what the hardware was asked to do.
        """
        c = self.config
        attention = 2 * length * c.n_heads * c.head_width  # q kᵀ and the weighted sum of v, multiply-adds per token
        projections = c.dim * c.head_width * 2 * (c.n_heads + c.kv_heads)
        feed_forward = (3 if c.activation == "swiglu" else 2) * c.dim * c.ffn_width
        head = c.dim * self.embed.num_embeddings
        return 2 * batch * length * (c.n_layers * (attention + projections + feed_forward) + head)

    def flops_per_token(self, length: int) -> int:
        """6N + 12·L·H·K·T, forward and backward, the convention of MFU (Chowdhery et al. 2022, arXiv:2204.02311, B).

        N counts a tied embedding once, and neither an untied input embedding nor learned positions: those are looked
        up, not multiplied. Causal attention is not halved; recomputed activations are not counted.
        """
        c = self.config
        looked_up = 0 if c.tie_embeddings else self.embed.weight.numel()
        if isinstance(self.position, LearnedPosition):
            looked_up += self.position.table.weight.numel()
        return 6 * (self.n_parameters() - looked_up) + 12 * c.n_layers * c.n_heads * c.head_width * length

    def _check_length(self, length: int, cache: Cache | None) -> None:
        if self.config.position == "learned" and length > self.config.max_length:
            raise ValueError(
                f"{length} tokens are more than model.max_length = {self.config.max_length} learned positions; "
                "cut the text, or raise model.max_length and train"
            )
        if cache is not None and length > cache.max_length:
            raise ValueError(
                f"{length} tokens are more than the cache holds ({cache.max_length}); build a longer Cache"
            )

    def _rotation(self, positions: Tensor) -> Rotation | None:
        if self.config.position != "rotary":
            return None
        return build_rotation(positions, self.config.head_width, self.config.rope_theta)

    def _mask(self, tokens: Tensor, documents: Tensor | None, cache: Cache | None) -> Mask:
        if cache is None:
            if documents is None:
                return causal_mask(tokens.shape[1], 0, tokens.device)
            return document_mask(documents)
        past = cache.documents
        if (documents is None) != (past is None) and cache.length > 0:
            raise ValueError("documents must be given for every forward with one cache, or for none")
        if documents is None:
            return causal_mask(tokens.shape[1], cache.length, tokens.device)
        cache.documents = documents if past is None else torch.cat((past, documents), dim=1)
        return document_mask(documents, past)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `to_empty` and some `to` make a new parameter for each place where one is registered, which unties them.
        super()._apply(fn, recurse)
        self.tie()
        return self


class Head(Linear):
    """Hidden states to the vocabulary, without bias. Tied, it borrows its weight: none is made or reset."""

    def __init__(self, dim: int, vocab_size: int, *, tied: bool) -> None:
        self.tied = tied
        if tied:
            with torch.device("meta"):
                super().__init__(dim, vocab_size, bias=False)
        else:
            super().__init__(dim, vocab_size, bias=False)

    def reset_parameters(self) -> None:
        if not self.tied:
            super().reset_parameters()
