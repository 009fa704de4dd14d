"""Bits per byte, the number that compares across tokenizers, perplexities, and two baselines that need no model."""

from __future__ import annotations

import gzip
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from llm.metric.score import Score, bootstrapped


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """A summed loss in nats as bits for each UTF-8 byte of the text that was predicted; NaN without text."""
    return nats / math.log(2) / n_bytes if n_bytes else math.nan


def unigram_bits_per_byte(texts: Iterable[str]) -> float:
    """Entropy of the bytes of `texts` taken one by one: what the best order-0 code of this very text would reach."""
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(text.encode())
    n_bytes = counts.total()
    return -sum(n / n_bytes * math.log2(n / n_bytes) for n in counts.values()) if n_bytes else math.nan


def gzip_bits_per_byte(texts: Iterable[str]) -> float:
    """gzip -9 on each text by itself, which is how the model sees them: one document knows nothing of the others."""
    n_bytes = n_compressed = 0
    for text in texts:
        raw = text.encode()
        n_bytes += len(raw)
        n_compressed += len(gzip.compress(raw, 9))
    return 8 * n_compressed / n_bytes if n_bytes else math.nan


def unigram_nats(counts: Sequence[int]) -> float:
    """Entropy in nats of what occurred so often each, taken one by one: the loss of the best model without context."""
    total = sum(counts)
    return -sum(n / total * math.log(n / total) for n in counts if n) if total else math.nan


def perplexity(nats: float, n: float) -> float:
    """e to the mean of `nats` over `n`: infinite where that is more than a number can hold."""
    try:
        return math.exp(nats / n)
    except OverflowError:
        return math.inf


def perplexities(
    nats: Sequence[float], n_tokens: Sequence[int], texts: Sequence[str], n_bootstrap: int = 0
) -> dict[str, Score]:
    """`perplexity` of the tokens, `word_perplexity` of what blanks part, which compares across tokenizers as
    `bits_per_byte` does; over all texts together.

    Args:
        nats: -log p of each text.
        n_tokens: of each text.
    """
    sizes = [(len(text.split()), len(text.encode())) for text in texts]
    counts = np.column_stack([nats, n_tokens, np.array(sizes, float)])

    def scored(chosen: np.ndarray) -> list[float]:
        total, n, n_words, n_bytes = chosen.sum(0).tolist()
        return [perplexity(total, n), perplexity(total, n_words), bits_per_byte(total, n_bytes)]

    found = bootstrapped(scored, counts, n_bootstrap)
    return dict(zip(("perplexity", "word_perplexity", "bits_per_byte"), found, strict=True))
