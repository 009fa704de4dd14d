"""Packing is exact best-fit decreasing, loses nothing, and comes out the same however it is divided."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data import pack as packing
from llm.data.pack import best_fit_decreasing, pack

lengths_and_row = st.integers(1, 40).flatmap(
    lambda longest: st.tuples(st.lists(st.integers(1, longest), min_size=1, max_size=80), st.just(longest))
)


def naive(lengths: Sequence[int], max_length: int) -> list[int]:
    """Room left in each row, by looking at every row for every piece."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in range(len(room)) if room[row] >= length]
        if fitting:
            room[min(fitting, key=room.__getitem__)] -= length
        else:
            room.append(max_length - length)
    return room


@given(lengths_and_row)
@settings(deadline=None, max_examples=300)
def test_equals_naive_best_fit_decreasing(case: tuple[list[int], int]) -> None:
    lengths, max_length = case
    rows = best_fit_decreasing(np.array(lengths), max_length)
    room = max_length - np.bincount(rows, weights=lengths)
    assert sorted(room.astype(int).tolist()) == sorted(naive(lengths, max_length))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 30))
@settings(deadline=None, max_examples=200)
def test_every_input_of_every_document_is_in_one_row(lengths: list[int], max_length: int) -> None:
    sizes = np.array(lengths) + 1  # stored with one token more than inputs
    starts = np.cumsum(sizes) - sizes
    (packed,) = pack(starts, np.array(lengths), max_length)
    seen = [t for start, n in zip(packed.starts, packed.lengths, strict=True) for t in range(start, start + n)]
    assert sorted(seen) == [t for start, n in zip(starts, lengths, strict=True) for t in range(start, start + n)]
    per_row = np.add.reduceat(packed.lengths, np.r_[0, packed.ends[:-1]])
    assert per_row.max() <= max_length
    assert packed.n_cut == sum(length > max_length for length in lengths)
    # Only the rest of a document is shorter than a row.
    assert len(packed.starts) == sum(-(-length // max_length) for length in lengths)


def test_pieces_of_a_row_keep_the_order_of_the_text() -> None:
    (packed,) = pack(np.array([0, 100, 200]), np.array([2, 9, 5]), 16)
    assert packed.starts.tolist() == [0, 100, 200]  # best fit put 9, 5, 2


def test_blocks_are_packed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCK", 50)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 120)
    starts = np.cumsum(lengths + 1) - lengths - 1
    whole = list(pack(starts, lengths, 16))
    alone = [next(pack(starts[at : at + 50], lengths[at : at + 50], 16)) for at in (0, 50, 100)]
    assert len(whole) == 3
    for one, other in zip(whole, alone, strict=True):
        assert one.starts.tolist() == other.starts.tolist()
        assert one.ends.tolist() == other.ends.tolist()


@given(st.lists(st.integers(0, 100), min_size=1, max_size=60), st.integers(1, 30), st.integers(0, 3))
@settings(deadline=None, max_examples=100)
def test_long_documents_give_the_same_rows_a_few_at_a_time(lengths: list[int], longest: int, more: int) -> None:
    starts = np.cumsum(lengths) - lengths
    arguments = (starts, np.array(lengths), longest + more, longest, lambda n: n + more)
    (at_once,) = pack(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_AT_ONCE", 4)
        parts = list(pack(*arguments))
    assert np.concatenate([part.starts for part in parts]).tolist() == at_once.starts.tolist()
    assert np.concatenate([part.lengths for part in parts]).tolist() == at_once.lengths.tolist()
    before = np.cumsum([0, *(len(part.starts) for part in parts[:-1])])
    ends = [part.ends + n for part, n in zip(parts, before, strict=True)]
    assert np.concatenate(ends).tolist() == at_once.ends.tolist()
    assert sum(part.n_cut for part in parts) == at_once.n_cut


def test_a_block_of_real_size_takes_seconds_not_minutes() -> None:
    lengths = np.random.default_rng(0).geometric(1 / 300, packing.BLOCK)
    (packed,) = pack(np.cumsum(lengths + 1), lengths, 1024)
    assert packed.lengths.sum() / (len(packed.ends) * 1024) > 0.9999
