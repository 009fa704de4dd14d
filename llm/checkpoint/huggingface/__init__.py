"""Weights of Hugging Face's into a network of ours and back."""

from llm.checkpoint.huggingface import settings
from llm.checkpoint.huggingface.folder import configuration, is_folder, labels_of, read, tokenizer_of, write
from llm.checkpoint.huggingface.multipliers import folded
from llm.checkpoint.huggingface.weights import HEADS, Translated, expected

__all__ = [
    "HEADS",
    "Translated",
    "configuration",
    "expected",
    "folded",
    "is_folder",
    "labels_of",
    "read",
    "settings",
    "tokenizer_of",
    "write",
]
