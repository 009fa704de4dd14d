"""Text <-> token ids. Importing this package loads neither torch nor tokenizers."""

from llm.tokenizer.recipe import SPLIT, ByteLevelBPE, Bytes, Pretrained, Unigram, WordPiece
from llm.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

__all__ = ["END_OF_TEXT", "SPLIT", "ByteLevelBPE", "Bytes", "Pretrained", "Tokenizer", "Unigram", "WordPiece"]
