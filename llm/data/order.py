"""Which rows make batch N: a pure function of (seed, N), in O(1) memory, whatever the number of processes or workers.

Rows are handed out one after the other; slot g is the g-th row of the whole run, and batch N is slots N*B to (N+1)*B.
Which source fills a slot is settled by rounding, so the sources are mixed as evenly as whole rows allow and never
drift; which row it gives is the next of its current epoch, an epoch being a permutation of its rows. So a batch runs
on into the next epoch and never shrinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# Shares are kept as integers out of 2^40, so that the millionth epoch is as exact as the first.
_UNIT = 1 << 40
# Four rounds make a strong pseudo-random permutation of large blocks (Luby and Rackoff 1988); a few bits take more.
_ROUNDS = 8
# Between the keys of two rounds: far enough that no round is another one with a few bits of its argument turned.
_STRIDE = np.uint64(0xD1B54A32D192ED03)
# Slots computed at once: numpy's cost per call is then shared by many small batches.
_CHUNK = 1 << 12


@dataclass(frozen=True)
class Slots:
    """What fills a run of slots, one entry each."""

    source: np.ndarray  # int64
    row: np.ndarray  # int64, within the source
    epoch: np.ndarray  # int64, of the source


@dataclass(frozen=True)
class Order:
    """`n_rows` and `shares` (of rows, in any unit) by source; a batch is `batch_size` slots."""

    n_rows: tuple[int, ...]
    shares: tuple[float, ...]
    batch_size: int
    seed: int

    def batch(self, index: int) -> Slots:
        """The rows of batch `index`, 0 <= index."""
        first, last = index * self.batch_size, (index + 1) * self.batch_size
        chunks = [_chunk(self, chunk) for chunk in range(first // _CHUNK, (last - 1) // _CHUNK + 1)]
        start = first % _CHUNK
        window = slice(start, start + self.batch_size)
        if len(chunks) == 1:
            return Slots(chunks[0].source[window], chunks[0].row[window], chunks[0].epoch[window])
        return Slots(
            *(np.concatenate([getattr(chunk, name) for chunk in chunks])[window] for name in ("source", "row", "epoch"))
        )

    def slots(self, first: int, count: int) -> Slots:
        """The rows of slots `first` to `first + count`."""
        source, nth = interleave(self.shares, first, count)
        n_rows = np.array(self.n_rows, np.int64)[source]
        epoch = nth // n_rows
        return Slots(source, permute(nth % n_rows, n_rows, _key(self.seed, source, epoch)), epoch)


@lru_cache(maxsize=4)
def _chunk(order: Order, index: int) -> Slots:
    return order.slots(index * _CHUNK, _CHUNK)


def interleave(shares: Sequence[float], first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The source of each slot from `first`, and how many slots that source had before it; both int64 [count].

    Of the first n slots, source 0 has floor(n * share); of the others, source 1 has its share rounded down; and so
    on, the last source having the rest. Each count grows by steps of 0 or 1 with n and they add up to n, so no slot
    is given twice and none is left; a count is never more than the number of sources away from n times the share.
    """
    assert 0 < count < 1 << 20, "longer runs could overflow 64 bits"
    parts = [max(1, round(share / sum(shares) * _UNIT)) for share in shares]
    source = np.zeros(count, np.int64)
    nth = np.zeros(count, np.int64)
    rest = first  # slots before `first` that no earlier source had: exact, as a Python integer
    further = np.arange(count + 1, dtype=np.int64)  # how many more of these there are at each slot
    for index, part in enumerate(parts):
        whole = sum(parts[index:])
        before, remainder = divmod(rest * part, whole)
        had = (remainder + further * part) // whole
        mine = np.diff(had) > 0
        source[mine] = index
        nth[mine] = before + had[:-1][mine]
        rest -= before
        further = further - had
    return source, nth


def permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Where `index` goes in a permutation of range(size) that `key` picks; elementwise.

    A Feistel network permutes the next power of two; what falls outside the range is sent on until it falls inside
    (cycle walking: Black and Rogaway 2002), which keeps it a permutation and takes two walks on average at most.
    """
    # Of the largest index (exact below 2^53), but at least 4: halves of a bit or two mix badly.
    bits = np.maximum(np.frexp((size - 1).astype(np.float64))[1], 4).astype(np.uint64)
    low_bits = bits // np.uint64(2)
    high_bits, ends = bits - low_bits, size.astype(np.uint64)
    result = _walked(index.astype(np.uint64), key, low_bits, high_bits)
    walking = np.flatnonzero(result >= ends)
    while len(walking):
        result[walking] = _walked(result[walking], key[walking], low_bits[walking], high_bits[walking])
        walking = walking[result[walking] >= ends[walking]]
    return result.astype(np.int64)


def _walked(value: np.ndarray, keys: np.ndarray, low_bits: np.ndarray, high_bits: np.ndarray) -> np.ndarray:
    """One pass of the network."""
    one = np.uint64(1)
    low_mask, high_mask = (one << low_bits) - one, (one << high_bits) - one
    low, high = value & low_mask, value >> low_bits
    for _ in range(0, _ROUNDS, 2):
        high ^= _mix(low ^ keys) & high_mask
        keys = keys + _STRIDE
        low ^= _mix(high ^ keys) & low_mask
        keys = keys + _STRIDE
    return (high << low_bits) | low


def _key(seed: int, source: np.ndarray, epoch: np.ndarray) -> np.ndarray:
    """uint64: unrelated keys for every (seed, source, epoch)."""
    start = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64))
    return _mix(_mix(start + source.astype(np.uint64)) + epoch.astype(np.uint64))


def _mix(value: np.ndarray) -> np.ndarray:
    """One step of SplitMix64 (Steele, Lea and Flood 2014): each bit of the input turns half of the output's."""
    value = value + np.uint64(0x9E3779B97F4A7C15)  # a copy, changed in place from here on
    shifted = value >> np.uint64(30)
    value ^= shifted
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= np.right_shift(value, np.uint64(27), out=shifted)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= np.right_shift(value, np.uint64(31), out=shifted)
    return value
