"""Texts -> tokens, on all cores and in bounded memory, however long or many the documents are."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from llm.tokenizer import Tokenizer

# Text encoded at once: enough to keep every core busy, little enough to hold a few times in memory, where the library
# takes some 150 bytes a token.
_CHUNK_CHARACTERS = 1 << 20
_CHUNK_PARTS = 1 << 13
_IN_FLIGHT = 2  # chunks at work: while Python takes the tokens out of one, the library's threads have the other
# Of a document encoded at once: one core works on it.
_LONGEST_PART = 1 << 16
# Where a document is cut for that: no tokenizer that splits a text into words has a token across.
_BREAK = re.compile(r"[^\W\d_](?= )")


@dataclass
class Chunk:
    """Texts to be encoded at once: documents, and parts of long ones."""

    parts: list[str] = field(default_factory=list)
    opens: list[bool] = field(default_factory=list)  # whether a document begins with this part
    closes: list[bool] = field(default_factory=list)  # whether it ends with it
    n_empty: int = 0  # documents without text, which are left out


Encoded = tuple[list[np.ndarray], list[np.ndarray]]


def encoded(
    texts: Iterator[str], tokenizer: Tokenizer, words: bool
) -> Iterator[tuple[Chunk, list[np.ndarray], list[np.ndarray]]]:
    """Each chunk, the tokens of its parts and, with `words`, where words begin in them.

    While the tokenizer's threads work on some chunks, this one reads the next and hands out the one before.
    """

    def encode(parts: list[str]) -> Encoded:
        if not words:
            return tokenizer.encode_batch(parts), []
        pairs = tokenizer.encode_words(parts)
        return [tokens for tokens, _ in pairs], [starts for _, starts in pairs]

    waiting: deque[tuple[Chunk, Future[Encoded]]] = deque()
    with ThreadPoolExecutor(_IN_FLIGHT) as pool:
        for chunk in _chunks(texts):
            waiting.append((chunk, pool.submit(encode, chunk.parts)))
            if len(waiting) > _IN_FLIGHT:
                first, coming = waiting.popleft()
                yield first, *coming.result()
        while waiting:
            first, coming = waiting.popleft()
            yield first, *coming.result()


def _chunks(texts: Iterator[str]) -> Iterator[Chunk]:
    chunk, size = Chunk(), 0
    for text in texts:
        if not text:
            chunk.n_empty += 1
        for start, end in _cuts(text):
            chunk.parts.append(text[start:end])
            chunk.opens.append(start == 0)
            chunk.closes.append(end == len(text))
            size += end - start
            if size >= _CHUNK_CHARACTERS or len(chunk.parts) >= _CHUNK_PARTS:
                yield chunk
                chunk, size = Chunk(), 0
    if chunk.parts or chunk.n_empty:
        yield chunk


def _cuts(text: str) -> Iterator[tuple[int, int]]:
    """Where the parts of a text begin and end: behind a word, or anywhere if there is none in half a part."""
    start = 0
    while start < len(text):
        end = min(start + _LONGEST_PART, len(text))
        if end < len(text):
            *_, end = (end, *(found.end() for found in _BREAK.finditer(text, end - _LONGEST_PART // 2, end)))
        yield start, end
        start = end


def joined(
    chunk: Chunk, ids: Sequence[np.ndarray], start: int, end: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Documents, each between `start` and `end`, one after the other, and the stored size of each part (int64)."""
    sizes = np.array([len(tokens) for tokens in ids], np.int64) + chunk.opens + chunk.closes
    first, last, nothing = np.array([start], np.uint32), np.array([end], np.uint32), np.empty(0, np.uint32)
    bounds = zip(ids, chunk.opens, chunk.closes, strict=True)
    parts = [
        part
        for tokens, opens, closes in bounds
        for part in (first if opens else nothing, tokens, last if closes else nothing)
    ]
    return (np.concatenate(parts) if parts else nothing).astype(dtype), sizes
