"""Pairs of text for next-sentence prediction, drawn once at preparation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

FOLLOWS, ELSEWHERE = 0, 1  # labels, as Hugging Face's BERT has them


@dataclass(frozen=True)
class Pairs:
    """int64 [pairs] each: where first and second part begin in the token file, their tokens, and whether the second
    follows the first."""

    first: np.ndarray
    n_first: np.ndarray
    second: np.ndarray
    n_second: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.first)


def draw_pairs(starts: np.ndarray, lengths: np.ndarray, longest: int, seed: tuple[int, int]) -> Pairs:
    """One pass over documents of `lengths` tokens at `starts` as pairs of at most `longest` tokens together.

    A document is cut into stretches whose lengths are drawn between a quarter of `longest` and the whole, so that a row
    holds several pairs; each stretch is cut in two at a random place, neither part shorter than a sixteenth of
    `longest` where there is as much. For half of the pairs the second part is thrown away and one of the same length
    taken from another document, and the document goes on behind the first part: so no text is lost (Devlin et al.
    2019's `create_instances_from_document`). What is taken ends its document exactly if what was thrown away did: else
    the end of a text would give the label away.
    """
    draw = np.random.default_rng([part & 0xFFFFFFFFFFFFFFFF for part in seed])
    by_length = np.argsort(lengths, kind="stable")
    documents = _Documents(starts, lengths, by_length, lengths[by_length])
    rows = [row for document in range(len(lengths)) for row in _of_document(document, documents, longest, draw)]
    columns = np.array(rows, np.int64).reshape(-1, 5).T
    return Pairs(*columns)


class _Documents(NamedTuple):
    """Where documents begin, their lengths, and their order by length with the lengths in it."""

    starts: np.ndarray
    lengths: np.ndarray
    by_length: np.ndarray
    rising: np.ndarray


def _of_document(
    document: int, documents: _Documents, longest: int, draw: np.random.Generator
) -> Iterator[tuple[int, int, int, int, int]]:
    at = int(documents.starts[document])
    end = at + int(documents.lengths[document])
    least = max(1, longest // 16)
    while end - at >= 2:
        size = min(end - at, int(draw.integers(max(2, longest // 4), longest + 1)))
        if 0 < end - at - size < 2 * least:  # too little for a pair of its own
            size = end - at if end - at <= longest else (end - at) // 2
        shortest = min(least, size // 2)
        n_first = int(draw.integers(shortest, size - shortest + 1))
        n_second, is_end = size - n_first, at + size == end
        if draw.random() < 0.5:
            yield at, n_first, at + n_first, n_second, FOLLOWS
            at += size
            continue
        other = _another(document, n_second, documents, draw)
        n_second = min(n_second, int(documents.lengths[other]))
        room = int(documents.lengths[other]) - n_second
        offset = room if is_end else int(draw.integers(room + 1))
        yield at, n_first, int(documents.starts[other]) + offset, n_second, ELSEWHERE
        at += n_first


def _another(document: int, n_tokens: int, documents: _Documents, draw: np.random.Generator) -> int:
    """A document but this one, with so many tokens if there is one; else the longest."""
    first = int(np.searchsorted(documents.rising, n_tokens))
    long_enough = documents.by_length[first:]
    n_others = len(long_enough) - int(documents.lengths[document] >= n_tokens)
    if n_others == 0:
        return int(next(other for other in documents.by_length[::-1] if other != document))
    while (other := int(long_enough[draw.integers(len(long_enough))])) == document:
        pass
    return other
