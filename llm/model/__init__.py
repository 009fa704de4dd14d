"""Transformers: tensors in, tensors out.

One legend of shapes for the whole room: B batch, T length, S length of the keys, D dim, H heads, G key/value heads,
K head dim, F feed-forward dim, V vocabulary, L layers.

Importing this package loads no torch, so that a mistake in a configuration is reported before anything heavy starts.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llm.model.config import Pretrained, RopeScaling, TransformerConfig, config_from, node_of

if TYPE_CHECKING:
    from llm.model.block import Block
    from llm.model.cache import Cache
    from llm.model.initialisation import initialise
    from llm.model.transformer import Source, Transformer

_HOMES = {
    "Block": "llm.model.block",
    "Cache": "llm.model.cache",
    "Source": "llm.model.transformer",
    "Transformer": "llm.model.transformer",
    "initialise": "llm.model.initialisation",
}

__all__ = [
    "Block",
    "Cache",
    "Pretrained",
    "RopeScaling",
    "Source",
    "Transformer",
    "TransformerConfig",
    "config_from",
    "initialise",
    "node_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
