"""Pairs of text for next-sentence prediction, drawn once at preparation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    holds several pairs; each stretch is cut in two at a random place. For half of the pairs the second part is thrown
    away and one of the same length taken from another document, and the document goes on behind the first part: so no
    text is lost (Devlin et al. 2019's `create_instances_from_document`).
    """
    draw = np.random.default_rng([part & 0xFFFFFFFFFFFFFFFF for part in seed])
    others = np.flatnonzero(lengths > 0)
    rows = [
        row for document in others.tolist() for row in _of_document(document, starts, lengths, longest, others, draw)
    ]
    columns = np.array(rows, np.int64).reshape(-1, 5).T
    return Pairs(*columns)


def _of_document(
    document: int, starts: np.ndarray, lengths: np.ndarray, longest: int, others: np.ndarray, draw: np.random.Generator
) -> Iterator[tuple[int, int, int, int, int]]:
    at, end = int(starts[document]), int(starts[document] + lengths[document])
    while end - at >= 2:
        size = min(end - at, int(draw.integers(max(2, longest // 4), longest + 1)))
        n_first = int(draw.integers(1, size))
        if draw.random() < 0.5:
            yield at, n_first, at + n_first, size - n_first, FOLLOWS
            at += size
        else:
            other = document
            while other == document:
                other = int(others[draw.integers(len(others))])
            n_second = min(size - n_first, int(lengths[other]))
            start = int(starts[other]) + int(draw.integers(int(lengths[other]) - n_second + 1))
            yield at, n_first, start, n_second, ELSEWHERE
            at += n_first
