from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from llm.reduce import (
    AnyRaised,
    Totals,
    all_sum,
    clip_gradients,
    from_first,
    gather_objects,
    n_processes,
    rank,
    use,
)
from tests.ranks import run_on_ranks

finite = st.floats(-1e6, 1e6, width=32)


def part(total: float, count: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(total), torch.tensor(count)


def test_totals_add_up_and_start_again() -> None:
    totals = Totals()
    totals.add({"loss": part(3.0, 2), "tokens": part(5.0, 1)})
    totals.add({"loss": part(4.0, 5), "tokens": part(7.0, 1)})
    assert totals.reduce() == {"loss": (7.0, 7.0), "tokens": (12.0, 2.0)}
    assert totals.reduce() == {}


def test_totals_keep_the_digits_of_millions_of_terms() -> None:
    totals = Totals()
    for _ in range(100):
        totals.add({"loss": part(16_777_217.0, 1)})  # 2^24 + 1, which float32 cannot add to
    assert totals.reduce()["loss"] == (pytest.approx(100 * torch.tensor(16_777_217.0).item(), abs=0), 100.0)


def test_totals_survive_a_checkpoint() -> None:
    one, two = Totals(), Totals()
    one.add({"loss": part(1.5, 2)})
    two.load_state_dict(one.state_dict())
    one.add({"loss": part(2.5, 2)})  # the copy does not follow
    assert two.reduce() == {"loss": (1.5, 2.0)}


def test_names_must_stay_the_same() -> None:
    totals = Totals()
    totals.add({"loss": part(1.0, 1)})
    with pytest.raises(AssertionError, match="other"):
        totals.add({"other": part(1.0, 1)})


def test_one_process_is_its_own_sum() -> None:
    assert n_processes() == 1
    assert all_sum(torch.tensor([2.0, 3.0])).tolist() == [2.0, 3.0]


# Several processes


def sums(n: int) -> list[object]:
    """What each of n ranks gets: a sum, the first's value, everybody's."""
    mine = torch.tensor([float(rank()), 1.0])
    return [
        n_processes(),
        all_sum(mine.clone()).tolist(),
        from_first(mine.clone()).tolist(),
        gather_objects({"rank": rank()}),
    ]


def test_ranks_get_the_same_sums() -> None:
    expected = [2, [1.0, 2.0], [0.0, 1.0], [{"rank": 0}, {"rank": 1}]]
    assert run_on_ranks(sums, 2, 2) == [expected, expected]


def continued_totals() -> dict[str, tuple[float, float]]:
    """A checkpoint in the middle of a flush interval, of which only rank 0's copy is written, and read by all."""
    before = Totals()
    before.add({"loss": part(float(rank() + 1), 2)})
    states = gather_objects(before.state_dict())
    after = Totals()
    after.load_state_dict(states[0])
    after.add({"loss": part(10.0, 1)})
    return after.reduce()


def test_totals_of_all_ranks_survive_a_checkpoint() -> None:
    assert run_on_ranks(continued_totals, 2) == [{"loss": (23.0, 6.0)}] * 2


def sums_over_data() -> list[object]:
    """Ranks 0 and 1 have the same data, as have 2 and 3: each is counted once."""
    groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    use(groups[rank() % 2])
    try:
        totals = Totals()
        totals.add({"loss": part(float(rank() // 2 + 1), 1)})
        return [n_processes(), totals.peek("loss"), totals.reduce(), all_sum(torch.tensor([4.0])).item()]
    finally:
        use(None)


def test_what_several_ranks_share_is_counted_once() -> None:
    assert run_on_ranks(sums_over_data, 4) == [[2, 3.0, {"loss": (3.0, 2.0)}, 8.0]] * 4


def told() -> list[bool]:
    """Rank 1 raises its flag in the third call."""
    any_raised = AnyRaised()
    answers = [any_raised(rank() == 1 and call >= 2) for call in range(4)]
    return [*answers, any_raised.close()]


def test_all_learn_of_a_flag_in_the_same_call() -> None:
    assert run_on_ranks(told, 2) == [[False, False, False, True, False]] * 2


def test_a_flag_that_nobody_asked_about_any_more() -> None:
    assert run_on_ranks(told_last, 2) == [[False, True]] * 2


def told_last() -> list[bool]:
    any_raised = AnyRaised()
    return [any_raised(rank() == 0), any_raised.close()]


def test_a_process_alone_is_told_at_once() -> None:
    any_raised = AnyRaised()
    assert [any_raised(False), any_raised(True), any_raised.close()] == [False, True, False]


def clipped(limit: float) -> tuple[float, list[Tensor]]:
    """Gradients that are whole, spread over one axis of a mesh of four, and over both."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    draw = torch.Generator().manual_seed(0)
    wholes = [torch.randn(4, 6, generator=draw) for _ in range(3)]
    spreads = [
        wholes[0].clone(),
        distribute_tensor(wholes[1], mesh["shard"], [Shard(0)]),
        distribute_tensor(wholes[2], mesh, [Shard(0), Shard(1)]),
    ]
    parameters = [nn.Parameter(torch.zeros_like(spread)) for spread in spreads]
    for parameter, spread in zip(parameters, spreads, strict=True):
        parameter.grad = spread
    norm = clip_gradients([*parameters, nn.Parameter(torch.zeros(1))], limit)
    gradients = [parameter.grad for parameter in parameters]
    return norm.item(), [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients if g is not None]


@pytest.mark.parametrize("limit", [1.5, float("inf")])
def test_clipping_over_mixed_meshes(limit: float) -> None:
    draw = torch.Generator().manual_seed(0)
    plain = [nn.Parameter(torch.zeros(4, 6)) for _ in range(3)]
    for parameter in plain:
        parameter.grad = torch.randn(4, 6, generator=draw)
    norm = nn.utils.clip_grad_norm_(plain, limit)
    for got, gradients in run_on_ranks(clipped, 4, limit):
        assert got == pytest.approx(norm.item(), rel=1e-6)
        torch.testing.assert_close(gradients, [parameter.grad for parameter in plain])


@given(steps=st.lists(st.tuples(finite, st.integers(0, 2**40), st.booleans()), min_size=1, max_size=300))
def test_totals_do_not_depend_on_who_looks(steps: list[tuple[float, int, bool]]) -> None:
    """Bit for bit one addition after the other, in float64, whenever they are looked at."""
    looked, left, total, count = Totals(), Totals(), 0.0, 0
    for value, n, look in steps:
        for totals in (looked, left):
            totals.add({"loss": (torch.tensor(value), torch.tensor(n)), "steps": (1, 1)})
        total, count = total + value, count + n
        if look:
            looked.peek("loss")
    expected = {"loss": (total, float(count)), "steps": (float(len(steps)),) * 2}
    assert looked.reduce() == left.reduce() == expected
