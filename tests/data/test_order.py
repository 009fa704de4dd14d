"""Order is a pure function: every epoch a permutation, every mixture exact, every slicing a partition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.order import Order, interleave, permute

sizes = st.integers(1, 700)


def take(order: Order, count: int, first: int = 0) -> list[tuple[int, int, int]]:
    slots = order.slots(first, count)
    return list(zip(slots.source.tolist(), slots.row.tolist(), slots.epoch.tolist(), strict=True))


@given(n=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=100)
def test_permute_is_a_permutation(n: int, key: int) -> None:
    moved = permute(np.arange(n), np.full(n, n), np.full(n, key, np.uint64))
    assert sorted(moved.tolist()) == list(range(n))


@pytest.mark.parametrize("n", [2, 3, 5, 10, 33, 100, 1000])
def test_permutations_are_even_handed(n: int) -> None:
    """Over many keys each index goes to each tenth (or place) of the range equally often."""
    keys = np.random.default_rng(n).integers(0, 2**64, 2000, np.uint64)
    for index in (0, n - 1):
        moved = permute(np.full(2000, index), np.full(2000, n), keys)
        n_bins = min(n, 10)
        counts = np.bincount(moved * n_bins // n, minlength=n_bins)
        expected = np.bincount(np.arange(n) * n_bins // n) / n * 2000
        assert ((counts - expected) ** 2 / expected).sum() < 35  # chi-square, 9 degrees: p < 1e-4


@given(n_rows=st.lists(sizes, min_size=1, max_size=4), data=st.data(), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=60)
def test_each_epoch_of_each_source_is_a_permutation(n_rows: list[int], data: st.DataObject, seed: int) -> None:
    shares = data.draw(st.lists(st.floats(0.05, 1), min_size=len(n_rows), max_size=len(n_rows)))
    order = Order(tuple(n_rows), tuple(shares), 8, seed)
    seen: dict[tuple[int, int], list[int]] = {}
    last: dict[int, int] = {}
    for source, row, epoch in take(order, 20_000):
        seen.setdefault((source, epoch), []).append(row)
        assert epoch >= last.get(source, 0)
        last[source] = epoch
    for (source, epoch), rows in seen.items():
        assert len(set(rows)) == len(rows)
        if epoch < last[source]:
            assert sorted(rows) == list(range(n_rows[source]))


@given(
    shares=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=6), first=st.integers(0, 2**40), n=st.integers(1, 2000)
)
@settings(deadline=None, max_examples=200)
def test_the_mixture_never_drifts(shares: list[float], first: int, n: int) -> None:
    """After any number of slots each source is within one per source of its share, and counts on without a gap."""
    source, nth = interleave(shares, first, n)
    assert ((source >= 0) & (source < len(shares))).all()
    for index, share in enumerate(shares):
        mine = nth[source == index]
        if len(mine):
            assert mine.tolist() == list(range(mine[0], mine[0] + len(mine)))
            wanted = first * (share / sum(shares))
            assert abs(mine[0] - wanted) <= len(shares) + 1 + first * 1e-9


def test_shares_are_exact_over_whole_periods() -> None:
    source, _ = interleave([0.5, 0.25, 0.25], 0, 4000)
    assert np.bincount(source).tolist() == [2000, 1000, 1000]
    assert np.bincount(source[:4]).tolist() == [2, 1, 1]  # as evenly as can be


def test_a_rare_source_comes_at_all() -> None:
    source, _ = interleave([1.0, 1e-3], 0, 10_000)
    assert 8 <= (source == 1).sum() <= 11


@given(batch_size=st.integers(1, 300), index=st.integers(0, 10**9), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_a_batch_is_its_slots_wherever_the_computation_is_divided(batch_size: int, index: int, seed: int) -> None:
    order = Order((1000, 37), (3.0, 1.0), batch_size, seed)
    batch = order.batch(index)
    slots = order.slots(index * batch_size, batch_size)
    for name in ("source", "row", "epoch"):
        assert getattr(batch, name).tolist() == getattr(slots, name).tolist()


def test_large_batches_span_several_chunks() -> None:
    order = Order((10_000,), (1.0,), 10_000, 0)
    assert sorted(order.batch(0).row.tolist()) == list(range(10_000))
    assert order.batch(0).row.tolist() != order.batch(1).row.tolist()


def test_a_batch_runs_on_into_the_next_epoch() -> None:
    slots = Order((10,), (1.0,), 8, 0).batch(1)
    assert slots.epoch.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]


def test_seeds_sources_and_epochs_differ() -> None:
    rows = [take(Order((500, 500), (1.0, 1.0), 8, seed), 2000) for seed in (0, 1, -1)]
    by_epoch = {
        (seed, source, epoch): tuple(row for s, row, e in taken if (s, e) == (source, epoch))
        for seed, taken in enumerate(rows)
        for source in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(by_epoch.values())) == len(by_epoch)


def test_the_millionth_epoch_costs_no_more_than_the_first() -> None:
    order = Order((1000,), (1.0,), 1000, 0)
    assert sorted(order.batch(10**6).row.tolist()) == list(range(1000))
