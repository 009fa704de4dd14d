"""How the processes of a run meet, wait for each other, fail and leave."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from llm.config import ConfigError
from llm.exit import LostPeerError
from llm.launch import Place
from llm.strategy import Rendezvous, rendezvous
from llm.strategy.environment import Environment


def a_place(rank: int, n: int, port: int = 29500, n_per_node: int | None = None) -> Place:
    per_node = n_per_node or n
    return Place(
        rank=rank,
        local_rank=rank % per_node,
        world_size=n,
        local_world_size=per_node,
        node_rank=rank // per_node,
        address="127.0.0.1",
        port=port,
        launcher="environment",
    )


def ranks(n: int, n_per_node: int | None = None) -> list[Rendezvous]:
    """Processes that meet, as threads of this one: to the store that is the same."""
    store = dist.HashStore()
    return [Rendezvous(a_place(rank, n, n_per_node=n_per_node), store) for rank in range(n)]


def each(functions: list[Callable[[], object]]) -> list[object]:
    """What the functions give, all running at once; exceptions too."""
    with ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(function) for function in functions]
        return [future.exception() or future.result() for future in futures]


@pytest.fixture
def port() -> Iterator[int]:
    """One that nobody has; a socket on it can be taken by `listen`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield free.getsockname()[1]


def test_a_process_alone_has_all_at_hand() -> None:
    alone = Rendezvous(a_place(0, 1), None)
    made = []
    alone.arrive()
    alone.once_per_node("data", lambda: made.append(1))
    assert alone.share("plan", lambda: {"step": 3}) == {"step": 3}
    assert alone.first_to_fail(70)
    alone.leave()
    assert made == [1]


def test_all_arrive() -> None:
    assert each([one.arrive for one in ranks(4)]) == [None] * 4


def test_those_that_do_not_arrive_are_named() -> None:
    store = dist.HashStore()
    here = [Rendezvous(a_place(rank, 4, port=29511), store) for rank in (0, 2)]
    for error in each([lambda one=one: one.arrive(patience_s=0.3) for one in here]):  # type: ignore[misc]
        assert isinstance(error, LostPeerError)
        assert str(error).startswith("rank 1, 3 of 4 did not arrive within 0 s at 127.0.0.1:29511 - start all of them")
        assert "if RANK or WORLD_SIZE are left from another program, unset them" in str(error)
        assert error.exit_code == 76


def test_rank_0_decides_and_the_others_wait() -> None:
    decided = threading.Event()

    def make() -> dict[str, int]:
        assert decided.wait(10)
        return {"step": 7}

    one, two = ranks(2)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(two.share, "start", pytest.fail)
        deciding = pool.submit(one.share, "start", make)
        decided.set()
        assert waiting.result(10) == deciding.result(10) == {"step": 7}


def test_one_process_of_each_node_prepares() -> None:
    made: list[int] = []
    all_of_them = ranks(6, n_per_node=3)
    assert (
        each([lambda one=one: one.once_per_node("data", lambda: made.append(one.here.rank)) for one in all_of_them])
        == [  # type: ignore[misc]
            None
        ]
        * 6
    )
    assert sorted(made) == [0, 3]


def test_who_waits_learns_that_another_failed() -> None:
    one, two, three = ranks(3)

    def fails() -> object:
        return one.first_to_fail(70)

    results = each([fails, lambda: two.share("start", pytest.fail), lambda: three.once_per_node("data", pytest.fail)])
    assert results[0] is True
    assert [str(result) for result in results[1:]] == ["rank 0 failed"] * 2
    for error in results[1:]:
        assert isinstance(error, LostPeerError)
        assert (error.exit_code, error.cause) == (76, 70)
    assert not two.first_to_fail(70)
    assert one.first_to_fail(70), "asking again changes nothing"


def test_who_waits_for_one_that_was_told_to_go_goes_as_if_told() -> None:
    one, two, three = ranks(3)
    assert two.first_to_fail(75)
    for error in each([lambda: one.all_here("fit"), lambda: three.share("start", pytest.fail)]):
        assert isinstance(error, LostPeerError)
        assert (str(error), error.exit_code) == ("rank 1 was told to go", 75)


def test_ranks_leave_together() -> None:
    left: list[int] = []
    gate = threading.Event()
    one, two = ranks(2)

    def early() -> None:
        one.leave()
        left.append(0)

    def late() -> None:
        assert gate.wait(10)
        left.append(1)
        two.leave()

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(early), pool.submit(late)]
        gate.set()
        assert [future.result(10) for future in both] == [None, None]
    assert left == [1, 0]
    assert [one.first_to_fail(70), two.first_to_fail(70)] == [True, False], "rank 0 says why they left"


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection from another test."""
    monkeypatch.setattr(rendezvous, "_connection", None)
    monkeypatch.setattr(rendezvous, "_current", None)


@pytest.mark.usefixtures("forgotten")
def test_a_port_in_use_is_named(port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"MASTER_PORT: 127\.0\.0\.1:{port} - in use by another program - choose"
        ):
            rendezvous._connect(a_place(0, 2, port))


@pytest.mark.usefixtures("forgotten")
def test_a_host_that_does_not_come_is_named(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "ARRIVAL_S", 1.0)
    with pytest.raises(
        LostPeerError, match=rf"rank 0 did not arrive at 127\.0\.0\.1:{port} within 1 s, or rank 1 cannot"
    ):
        rendezvous._connect(a_place(1, 2, port))


def test_lightning_is_told_what_is_so() -> None:
    environment = Environment(a_place(3, 4, n_per_node=2))
    environment.set_global_rank(0)
    environment.set_world_size(1)
    assert (environment.global_rank(), environment.local_rank(), environment.node_rank()) == (3, 1, 1)
    assert environment.world_size() == 4
    assert environment.creates_processes_externally
    assert (environment.main_address, environment.main_port) == ("127.0.0.1", 29500)
    assert not Environment.detect()
    environment.validate_settings(num_devices=2, num_nodes=2)


def test_lightning_is_silent_on_other_ranks(tmp_path: Path) -> None:
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    before = rank_zero_only.rank
    Environment(a_place(2, 4))
    assert rank_zero_only.rank == 2
    Environment(a_place(0, 1))
    rank_zero_only.rank = before


def loses(one: Rendezvous) -> None:
    """To be called in a thread of its own: the process would no longer listen to SIGTERM."""
    with one.naming_lost():
        raise RuntimeError("[pair.cc:1] Connection closed by peer [127.0.0.1]:7001. Check the logs.")


def test_a_rank_that_went_without_a_word_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "lost_contact", lambda error: isinstance(error, RuntimeError))
    one, _, three = ranks(3)
    for error in each([lambda one=one: loses(one) for one in (one, three)]):  # type: ignore[misc]
        assert isinstance(error, LostPeerError)
        assert str(error) == "lost contact with rank 1 (Connection closed by peer [127.0.0.1]:7001)"


def test_a_rank_that_said_it_failed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "lost_contact", lambda error: isinstance(error, RuntimeError))
    one, two, _ = ranks(3)
    assert two.first_to_fail(70)
    [error] = each([lambda: loses(one)])
    assert isinstance(error, LostPeerError)
    assert str(error).startswith("lost contact with rank 1 (")


def test_other_errors_stay_what_they_are() -> None:
    one, _ = ranks(2)
    with pytest.raises(KeyError), one.naming_lost():
        raise KeyError("weight")


def test_rank_0_may_take_its_time_to_leave() -> None:
    """It writes the summary; who had left before would look as if it had given up."""
    gone: list[int] = []
    gate = threading.Event()
    one, two = ranks(2)

    def slow() -> None:
        assert gate.wait(10)
        gone.append(0)
        one.leave()

    def quick() -> None:
        two.leave()
        gone.append(1)

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(quick), pool.submit(slow)]
        gate.set()
        assert [future.result(10) for future in both] == [None, None]
    assert gone == [0, 1]


def test_nodes_wait_for_the_node_whose_cache_is_cold() -> None:
    done: list[int] = []
    gate = threading.Event()
    nodes = ranks(2, n_per_node=1)

    def warm() -> None:
        nodes[0].once_per_node("data", gate.set)
        done.append(0)

    def cold() -> None:
        def make() -> None:
            assert gate.wait(10)
            done.append(1)

        nodes[1].once_per_node("data", make)

    assert each([warm, cold]) == [None, None]
    assert done == [1, 0]
