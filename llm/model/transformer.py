"""The whole network, from tokens to hidden states to logits."""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from llm.model.block import Block
from llm.model.cache import Cache
from llm.model.config import TransformerConfig
from llm.model.head import Head, Transform
from llm.model.initialisation import Embedding, Linear
from llm.model.mask import Places, Way
from llm.model.parametrization import logits_scale
from llm.model.stack import Memory, Stack


class Source(NamedTuple):
    """What an encoder-decoder's encoder reads; tokens, documents and positions as `Transformer.forward` has them, all
    [B, S]."""

    tokens: Tensor
    documents: Tensor | None = None
    positions: Tensor | None = None


class Transformer(nn.Module):
    """An encoder, a decoder, or both. `model(tokens)` gives hidden states, `model.logits(hidden)` the scores of the
    vocabulary: apart, since the logits are by far the largest tensor of a step and an objective may want them for some
    tokens only, or in parts.

    `mask_way` is how documents and windows are hidden from each other (see llm/model/mask.py): the numbers are the
    same to rounding, what is faster depends on the machine. The ways other than dense take it that the documents of a
    row lie one after the other.

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
        self.mask_way: Way = "dense"
        self.logits_scale = logits_scale(config)
        self.embed = Embedding(config, config.vocab_size, config.dim)
        n_encoder, n_decoder = config.encoder_layers, config.decoder_layers
        self.encoder = Stack(config, causal=False, n_layers=n_encoder) if n_encoder else None
        self.decoder = Stack(config, causal=True, n_layers=n_decoder) if n_decoder else None
        classifies = config.n_labels is not None
        self.transform = Transform(config) if config.family == "encoder" and not classifies else None
        self.head = None if classifies else Head(config, config.vocab_size)
        pools = config.next_sentence or (classifies and config.label_of == "text")
        self.pooler = Linear(config, "dim", "dim", bias=True) if pools else None
        self.next_sentence = Linear(config, "dim", 2, bias=True) if config.next_sentence else None
        self.classifier = Linear(config, "dim", config.n_labels, bias=True) if config.n_labels else None
        self.dropout = nn.Dropout(config.dropout) if classifies and config.dropout else nn.Identity()
        self.tie()

    @property
    def blocks(self) -> list[Block]:
        """Those of the encoder, then those of the decoder."""
        stacks = [stack for stack in (self.encoder, self.decoder) if stack is not None]
        return [block for stack in stacks for block in stack.blocks if isinstance(block, Block)]

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        *,
        segments: Tensor | None = None,
        source: Source | None = None,
    ) -> Tensor:
        """Hidden states after the last norm.

        tokens     int64 [B, T]
        documents  int64 [B, T], 1, 2, … per row, 0 = padding: a token sees only its own document, and only the source
                   of the same number. None: one document
        positions  int64 [B, T], None: 0, 1, … along the row (or on from the cache)
        cache      what came before; `tokens` are the new ones, and are added to it
        segments   int64 [B, T], which part of a pair a token is of; None: the first
        source     what the encoder of an encoder-decoder reads; with a cache only the first time

        Returns [B, T, D]. Raises ValueError if the tokens reach beyond learned positions or the cache, or for a source
        too much or too few.
        """
        self._check_source(source, cache)
        if self.decoder is None:
            assert self.encoder is not None
            if cache is not None:
                raise ValueError("model.family=encoder reads all tokens at once; leave the cache out")
            return self._run(self.encoder, tokens, documents, positions, segments=segments)
        memory = None
        if source is not None:
            assert self.encoder is not None
            hidden = self._run(self.encoder, *source)
            memory = Memory(hidden, source.documents)
            if cache is not None:
                cache.source_documents = source.documents
        elif cache is not None and cache.has_memory:
            memory = Memory(None, cache.source_documents)
        return self._run(self.decoder, tokens, documents, positions, cache, memory=memory)

    def _run(
        self,
        stack: Stack,
        tokens: Tensor,
        documents: Tensor | None,
        positions: Tensor | None,
        cache: Cache | None = None,
        *,
        segments: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """Tokens through one stack: [B, T] -> [B, T, D]."""
        n_past = 0 if cache is None else cache.length
        length = tokens.shape[1]
        self._check_length(n_past + length, cache)
        if positions is None:
            positions = torch.arange(n_past, n_past + length, device=tokens.device)
        places = Places(length, n_past, self._documents(documents, cache), tokens.device, self.mask_way)
        return stack(self.embed(tokens), positions, places, segments, cache, memory)

    def logits(self, hidden: Tensor, *, padded: bool = False) -> Tensor:
        """Scores of the vocabulary: [.., D] -> [.., V], or more where `padded` and the head's `multiple` say so. Not
        with model.n_labels."""
        assert self.head is not None, "model.n_labels is in the place of the vocabulary"
        if self.transform is not None:
            hidden = self.transform(hidden)
        if self.logits_scale != 1.0:
            hidden = hidden * self.logits_scale
        logits: Tensor = self.head(hidden)
        return logits if padded else logits[..., : self.config.vocab_size]

    def sentence_logits(self, hidden: Tensor) -> Tensor:
        """Scores of "the second part follows the first" and "it does not", from the hidden states of first tokens:
        [.., D] -> [.., 2]. Only with model.next_sentence."""
        assert self.pooler is not None, "model.next_sentence is false"
        assert self.next_sentence is not None
        return self.next_sentence(torch.tanh(self.pooler(hidden)))

    def label_logits(self, hidden: Tensor) -> Tensor:
        """Scores of the labels, from the hidden states of first tokens or, with model.label_of=token, of any:
        [.., D] -> [.., labels]. Only with model.n_labels."""
        assert self.classifier is not None, "model.n_labels is null"
        pooled = hidden if self.pooler is None else torch.tanh(self.pooler(hidden))
        return self.classifier(self.dropout(pooled))

    def tie(self) -> None:
        """Make the head's weight the embedding's again, where the configuration ties them, after one was replaced."""
        if self.config.tie_embeddings and self.head is not None:
            self.head.weight = self.embed.weight

    def n_parameters(self) -> int:
        """Weights and biases, a tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def matmul_flops(
        self, batch: int, length: int, target_length: int = 0, scored: int | None = None, pairs: int = 0
    ) -> int:
        """FLOPs of all matrix products in one forward; backward does twice as many.

        A multiply-add counts 2, and attention is counted in full: what is masked is computed (equal to
        torch.utils.flop_counter.FlopCounterMode under sdpa_kernel(MATH)). For what the hardware was asked to do.
        An encoder-decoder reads `length` tokens and writes `target_length`. Scores of the vocabulary, or of labels, are
        computed of `scored` positions of the batch, None: of all tokens; those of model.next_sentence of `pairs`.
        """
        c = self.config
        source, target = (length, target_length) if c.family == "encoder_decoder" else (length, length)
        width = c.n_heads * c.head_width
        projections = c.dim * c.head_width * 2 * (c.n_heads + c.kv_heads)
        feed_forward = (3 if c.gated else 2) * c.dim * c.ffn_width
        encoder = c.encoder_layers * source * (2 * source * width + projections + feed_forward)
        decoder = c.decoder_layers * target * (2 * target * width + projections + feed_forward)
        if c.family == "encoder_decoder":
            on_target, on_source = 2 * c.dim * width, 2 * c.dim * c.head_width * c.kv_heads
            decoder += c.decoder_layers * (target * (2 * source * width + on_target) + source * on_source)
        scores = sum(m.weight.numel() for m in (self.classifier, self.transform and self.transform.dense) if m)
        scores += 0 if self.head is None else c.dim * self.embed.num_embeddings
        pooled = 0 if self.pooler is None else c.dim**2
        if self.classifier is not None:
            scores, pooled = scores + pooled, 0
        pooled += 0 if self.next_sentence is None else 2 * c.dim
        scored = batch * target if scored is None else scored
        return 2 * (batch * (encoder + decoder) + scored * scores + pairs * pooled)

    def flops_per_token(self, length: int, target_length: int = 0, scored: float = 1.0) -> float:
        """6N + 12·L·H·K·T, forward and backward, the convention of MFU (Chowdhery et al. 2022, arXiv:2204.02311, B).

        N counts a tied embedding once, and neither an untied input embedding nor learned positions and segments: those
        are looked up, not multiplied. Causal attention is not halved; recomputed activations are not counted. Of an
        encoder-decoder, whose halves see different tokens, the mean over `length` tokens read and `target_length`
        written: a parameter counts for the tokens that it meets. Of an encoder the heads count for `scored`, the share
        of tokens whose logits are computed. Of frozen weights, which have no gradient, 4N.
        """
        c = self.config
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        each = 4 + 2 * trained / self.n_parameters()
        tables = [m for m in self.modules() if isinstance(m, nn.Embedding) and m is not self.embed]
        one = c.tie_embeddings or self.head is None  # a classifier's embedding is no head's, tied or not
        looked_up = sum(m.weight.numel() for m in tables) + (0 if one else self.embed.weight.numel())
        width = 12 * c.n_heads * c.head_width
        if self.decoder is None:
            head = self.embed.weight.numel() + sum(
                p.numel() for m in (self.transform, self.pooler) if m for p in m.parameters()
            )
            body = self.n_parameters() - looked_up - head
            scored = (
                0.0 if self.head is None else scored
            )  # a classifier looks the embedding up, and scores next to nothing
            return each * (body + scored * head) + c.n_layers * width * length
        if self.encoder is None:
            return each * (self.n_parameters() - looked_up) + c.n_layers * width * length
        read = sum(p.numel() for p in self.encoder.blocks.parameters())
        written = self.n_parameters() - looked_up - read
        attention = c.encoder_layers * length**2 + c.decoder_layers * target_length * (target_length + length)
        return (each * (read * length + written * target_length) + width * attention) / (length + target_length)

    def _check_source(self, source: Source | None, cache: Cache | None) -> None:
        both = self.encoder is not None and self.decoder is not None
        seen = cache is not None and cache.has_memory
        if both and source is None and not seen:
            raise ValueError("model.family=encoder_decoder needs a source to read; give source=Source(tokens)")
        if source is not None and (not both or seen):
            why = "the cache holds one already" if both else f"model.family={self.config.family} reads none"
            raise ValueError(f"source is given, but {why}; leave it out")

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

    def _documents(self, documents: Tensor | None, cache: Cache | None) -> Tensor | None:
        """Those of all keys: the ones in the cache, to which the new ones are added, before `documents`."""
        if cache is None:
            return documents
        past = cache.documents
        if (documents is None) != (past is None) and cache.length > 0:
            raise ValueError("documents must be given for every forward with one cache, or for none")
        if documents is not None:
            cache.documents = documents if past is None else torch.cat((past, documents), dim=1)
        return cache.documents

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `to_empty` and some `to` make a new parameter for each place where one is registered, which unties them.
        super()._apply(fn, recurse)
        self.tie()
        return self
