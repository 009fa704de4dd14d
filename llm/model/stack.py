"""One side of a Transformer: what is added to the embeddings, then the blocks."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llm.model.block import Block
from llm.model.cache import Cache
from llm.model.config import TransformerConfig
from llm.model.initialisation import Embedding
from llm.model.mask import Mask, Places, add_bias, cross_mask, self_mask
from llm.model.norm import build_norm
from llm.model.parametrization import base_width
from llm.model.position import LearnedPosition, RelativePosition, Rotation, SinusoidalPosition, build_rotation


class Memory(NamedTuple):
    """What the decoder looks at: hidden [B, S, D], None once a cache holds it, and its documents [B, S]."""

    hidden: Tensor | None
    documents: Tensor | None


class Stack(nn.Module):
    """Embeddings to hidden states.

    Args:
        config: of the whole network.
        causal: a decoder's, where tokens do not see later ones.
        n_layers: how many blocks.
    """

    def __init__(self, config: TransformerConfig, *, causal: bool, n_layers: int) -> None:
        super().__init__()
        self.config = config
        self.causal = causal
        self.position: nn.Module | None = None
        if config.position == "learned":
            self.position = LearnedPosition(config)
        elif config.position == "sinusoidal":
            self.position = SinusoidalPosition(base_width(config, "dim"))
        self.segment = None if causal or not config.n_segments else Embedding(config, config.n_segments, config.dim)
        self.embed_norm = build_norm(config, config.dim) if config.embed_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.relative = RelativePosition(config, causal=causal) if config.position == "relative" else None
        cross = causal and config.family == "encoder_decoder"
        normed = config.embed_norm and config.norm_position == "pre"
        self.blocks = nn.ModuleList(
            Block(config, cross=cross, attention_norm=not (normed and layer == 0)) for layer in range(n_layers)
        )
        # Post-norm blocks end in a norm of their own.
        self.norm = build_norm(config, config.dim) if config.norm_position == "pre" else nn.Identity()

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        places: Places,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """Embeddings [B, T, D] -> hidden states after the last norm, [B, T, D]."""
        if self.position is not None:
            hidden = self.position(hidden, positions)
        if self.segment is not None:
            hidden = hidden + self.segment(torch.zeros_like(positions) if segments is None else segments)
        hidden = self.dropout(self.embed_norm(hidden))
        kinds = {self.config.has_window(layer) for layer in range(len(self.blocks))}
        masks, rotations = self._masks(places, kinds), self._rotations(positions, kinds)
        memory_mask = None
        if memory is not None:
            own = None if places.documents is None else places.documents[:, places.n_past :]
            memory_mask = cross_mask(own, memory.documents, places.length, places.way)
        for layer, block in enumerate(self.blocks):
            kind = self.config.has_window(layer)
            layer_cache = None if cache is None else cache.layers[layer]
            if memory is None:
                hidden = block(hidden, masks[kind], rotations[kind], layer_cache)
            else:
                hidden = block(hidden, masks[kind], rotations[kind], layer_cache, memory.hidden, memory_mask)
        return self.norm(hidden)

    def _masks(self, places: Places, kinds: Iterable[bool]) -> dict[bool, Mask]:
        """The mask of the layers with a window (True) and of those without."""
        if self.relative is not None:
            places = places._replace(way="dense")  # a bias is added to every score
        masks = {
            kind: self_mask(places, causal=self.causal, window=self.config.window if kind else None) for kind in kinds
        }
        if self.relative is None:
            return masks
        bias = self.relative(places.offsets())
        return {kind: add_bias(mask, bias, places) for kind, mask in masks.items()}

    def _rotations(self, positions: Tensor, kinds: Iterable[bool]) -> dict[bool, Rotation | None]:
        """The rotation of the layers with a window (True) and of those without."""
        c = self.config
        if c.position != "rotary":
            return dict.fromkeys(kinds)
        if c.local_rope_theta is None:
            return dict.fromkeys(kinds, build_rotation(positions, c.head_width, c.rope_theta, c.rope_scaling))
        thetas = {True: c.local_rope_theta, False: c.rope_theta}
        return {kind: build_rotation(positions, c.head_width, thetas[kind], c.rope_scaling) for kind in kinds}
