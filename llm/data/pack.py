"""Placing documents into rows of equal length by best-fit decreasing, within fixed blocks of documents.

Best-fit decreasing (Johnson et al. 1974): the longest piece first, each into the fullest row that still has room for
it. A block is `BLOCK` documents however many processes prepare them, so each block can be packed anywhere with the
same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

# Only the last rows of a block are not full, so blocks must be long: even of 50-token documents, a block is 400 rows
# of 8192.
BLOCK = 1 << 16
# Of the pieces of a block that are as long as a row, which nothing is to be searched for: so many are written at once.
_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Packed:
    """Rows as runs of pieces: row r is pieces `ends[r-1]:ends[r]`; piece p is `lengths[p]` inputs from `starts[p]`."""

    starts: np.ndarray  # int64 [pieces], where in the token file
    lengths: np.ndarray  # int32 [pieces]
    ends: np.ndarray  # int64 [rows]
    n_cut: int  # documents longer than a row


Cost = Callable[[np.ndarray], np.ndarray]


def pack(
    starts: np.ndarray, lengths: np.ndarray, max_length: int, longest: int | None = None, cost: Cost | None = None
) -> Iterator[Packed]:
    """Rows of `max_length` positions from documents of `lengths` inputs that begin at tokens `starts`, by block.

    Pieces are at most `longest` inputs long (None: as long as a row), and take `cost(lengths)` positions (None: one for
    each input).
    """
    for first in range(0, len(starts), BLOCK):
        block = slice(first, first + BLOCK)
        cut = (starts[block].astype(np.int64), lengths[block].astype(np.int64), longest or max_length)
        yield from _pack_block(*cut, max_length, cost or (lambda lengths: lengths))


def _pack_block(starts: np.ndarray, lengths: np.ndarray, longest: int, max_length: int, cost: Cost) -> Iterator[Packed]:
    """One after the other, as if they were packed together: in bounded memory, however long the documents are."""
    # Every document of more than a row is cut into whole rows and a rest.
    n_cut = int((lengths > longest).sum())
    n_whole = lengths // longest
    shorter, whole = cost(np.array([longest - 1, longest]))
    if n_whole.sum() > _AT_ONCE and shorter < max_length == whole:
        yield from _whole_rows(starts, n_whole, longest)
        starts, lengths = starts + n_whole * longest, lengths % longest
    n_pieces = -(-lengths // longest)
    document = np.repeat(np.arange(len(starts)), n_pieces)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
    offset = nth * longest
    piece_lengths = np.minimum(lengths[document] - offset, longest)
    order, ends = placed(cost(piece_lengths), max_length)
    yield Packed(
        starts=(starts[document] + offset)[order],
        lengths=piece_lengths[order].astype(np.int32),
        ends=ends,
        n_cut=n_cut,
    )


def _whole_rows(starts: np.ndarray, n_whole: np.ndarray, longest: int) -> Iterator[Packed]:
    """The first `n_whole` pieces of each document, a row each: what best fit begins with."""
    ends = np.cumsum(n_whole)
    for first in range(0, int(ends[-1]), _AT_ONCE):
        piece = np.arange(first, min(first + _AT_ONCE, int(ends[-1])))
        document = np.searchsorted(ends, piece, side="right")
        nth = piece - (ends - n_whole)[document]
        lengths = np.full(len(piece), longest, np.int32)
        yield Packed(starts[document] + nth * longest, lengths, np.arange(1, len(piece) + 1), n_cut=0)


def placed(costs: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces that take `costs` positions, in rows: their order, and where in it each row ends (int64 both)."""
    row = best_fit_decreasing(costs, max_length)
    # Best fit leaves the pieces of a row by falling length, which says nothing about the text: back to the order of
    # the text.
    return np.argsort(row, kind="stable"), np.cumsum(np.bincount(row))


def best_fit_decreasing(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """The row of each piece (int64 [pieces], rows counted from 0): exact, O(n + distinct lengths * max_length / 64).

    Rows with equal room left are interchangeable, so they are kept in stacks by room, and one big integer has a bit
    for every stack that is not empty: the fullest row with room for n is its lowest bit from n upwards.
    """
    order = np.argsort(-lengths, kind="stable")
    whole = int(np.searchsorted(-lengths[order], 1 - max_length))  # as long as a row: nothing to search
    rows = list(range(whole))
    stacks: list[list[int]] = [[] for _ in range(max_length + 1)]
    occupied = 0
    n_rows = whole
    for length in lengths[order[whole:]].tolist():
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = stacks[room].pop()
            if not stacks[room]:
                occupied ^= 1 << room
        else:
            room, row = max_length, n_rows
            n_rows += 1
        rows.append(row)
        room -= length
        if room:
            stacks[room].append(row)
            occupied |= 1 << room
    placed = np.empty(len(rows), np.int64)
    placed[order] = rows
    return placed
