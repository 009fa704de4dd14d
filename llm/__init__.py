"""Train language models on your own cluster: PyTorch Lightning, composed by Hydra.

The public names are imported when they are first used: `import llm` alone loads no torch.
`llm.generate.generate` and `llm.run.run` are imported from their modules, whose names they share.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Tokenizer": "llm.tokenizer",
    "Transformer": "llm.model",
    "TransformerConfig": "llm.model",
    "load": "llm.checkpoint",
}

__all__ = ["Tokenizer", "Transformer", "TransformerConfig", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
