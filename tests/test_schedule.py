from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.schedule import Constant, Cosine, InverseSquareRoot, Linear, Schedule, WarmupStableDecay

DECAYS = [Cosine, Linear, WarmupStableDecay]


@given(
    kind=st.sampled_from([*DECAYS, Constant, InverseSquareRoot]),
    warmup=st.integers(0, 50),
    length=st.integers(51, 400),
    final=st.floats(0, 1),
)
def test_rises_to_one_and_never_rises_again(kind: type[Schedule], warmup: int, length: int, final: float) -> None:
    schedule = kind(warmup, length, final) if kind in DECAYS else kind(warmup)  # type: ignore[call-arg]
    factors = [schedule(step) for step in range(length)]
    assert all(0 < low < high < 1 for low, high in pairwise(factors[:warmup]))
    assert factors[warmup] == 1
    assert all(a >= b - 1e-12 for a, b in pairwise(factors[warmup:]))
    if kind in DECAYS and length - warmup > 1:
        assert factors[-1] == pytest.approx(final)


def test_warmup_starts_above_zero_so_that_no_step_is_wasted() -> None:
    assert [Constant(4)(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_is_halfway_in_the_middle() -> None:
    assert Cosine(0, 101, 0.2)(50) == pytest.approx(0.6)
    assert Cosine(0, 101)(25) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_inverse_square_root_is_the_formula_of_vaswani() -> None:
    """Relative to its peak at step = warmup: min(step^-0.5, step * warmup^-1.5) * warmup^0.5."""
    schedule = InverseSquareRoot(400)
    for step in (400, 1600, 6400):
        assert schedule(step) == pytest.approx(step**-0.5 * 400**0.5)


def test_stable_phase_lasts_until_the_decay() -> None:
    schedule = WarmupStableDecay(10, 101, decay_share=0.5)
    assert {schedule(step) for step in range(10, 51)} == {1.0}
    assert schedule(75) == pytest.approx(0.5)
    assert schedule(100) == 0


def test_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule\.warmup_steps: 20 .* below trainer\.max_steps=10 .*=1$"):
        Linear(20, 10)


def test_length_may_come_later() -> None:
    assert Linear(20, None).max_steps is None
