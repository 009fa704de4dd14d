"""What a test of several ranks can rely on, most of all when it fails."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import IO, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from llm.launch import Place, place
from llm.strategy.process_group import fake_ranks
from tests import ranks
from tests.ranks import RankError, run_on_ranks

ROOT = Path(__file__).parents[1]
MARK = "TESTS_RANKS_MARK"
DEEP = """
import time, pytest
from tests import ranks
ranks.PRELOAD = ("torch",)

def where():
    return __name__

def test_first():
    assert ranks.run_on_ranks(where, 2) == ["trials.deep.test_deep"] * 2

@pytest.mark.timeout(1)
def test_that_hangs():
    ranks.run_on_ranks(time.sleep, 2, 600)

def test_after():
    test_first()
"""


def test_ranks_share_a_group_and_results_are_in_their_order() -> None:
    assert run_on_ranks(add_up, 2, 10.0) == [(0, 21.0), (1, 21.0)]


def test_ranks_of_several_world_sizes_stay_and_serve_again() -> None:
    two, four = run_on_ranks(process, 2), run_on_ranks(process, 4)
    assert len({*two, *four, os.getpid()}) == 7
    started = time.monotonic()
    assert (run_on_ranks(process, 2), run_on_ranks(process, 4)) == (two, four)
    assert time.monotonic() - started < 1


def test_each_rank_knows_its_place() -> None:
    for here, seen in enumerate(run_on_ranks(where, 2)):
        assert seen == Place(here, here, 2, 2, 0, "127.0.0.1", seen.port, "environment")


def test_the_master_port_is_free() -> None:
    run_on_ranks(meet_at_the_master_port, 2)


def test_the_callers_variables_and_directory_are_the_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLM_RUN_ID", "mine")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.chdir(tmp_path)
    assert run_on_ranks(surroundings, 2) == [("mine", None, "1", "PASSIVE", 1, False, str(tmp_path))] * 2


def test_a_call_finds_nothing_of_the_one_before() -> None:
    before = run_on_ranks(state, 2)
    run_on_ranks(disturb, 2)
    after = run_on_ranks(state, 2)
    assert after == before
    assert before[0][0] != os.getpid()
    assert [seen[-1] for seen in before] == [random.Random(rank).random() for rank in range(2)]


def test_a_call_that_ends_the_process_group_is_the_last_of_its_ranks() -> None:
    before = run_on_ranks(process, 2)
    run_on_ranks(dist.destroy_process_group, 2)
    assert set(before).isdisjoint(run_on_ranks(process, 2))
    assert run_on_ranks(add_up, 2, 0.0) == [(0, 1.0), (1, 1.0)]


def test_ranks_that_hold_many_groups_are_replaced() -> None:
    before = run_on_ranks(process, 2)
    run_on_ranks(leave_groups_behind, 2, 40)
    assert set(before).isdisjoint(run_on_ranks(process, 2))


def test_an_exception_is_shown_with_its_traceback_and_all_output() -> None:
    before = run_on_ranks(process, 2)
    with pytest.raises(RankError) as caught:
        run_on_ranks(raise_on, 2, 1)
    lines = str(caught.value).splitlines()
    assert lines[0] == "raise_on on 2 ranks: rank 1 raised KeyError: 'the cause'"
    assert lines[1].startswith("rank 0 raised RuntimeError: ")
    assert "--- rank 1:" in lines
    assert '    raise KeyError("the cause")' in lines
    assert "--- rank 0:" not in lines
    assert lines[-5:] == ["--- output of rank 0:", "rank 0 was here", "", "--- output of rank 1:", "rank 1 was here"]
    assert set(before).isdisjoint(run_on_ranks(process, 2))


def test_output_of_a_call_that_succeeds_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    run_on_ranks(raise_on, 2, 7)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(RankError) as caught:
        run_on_ranks(exit_on, 2, 0, 3)
    assert "was here" not in str(caught.value)


@pytest.mark.parametrize(("code", "line"), [(3, "exited with code 3"), (-signal.SIGKILL, "was killed by SIGKILL")])
def test_a_rank_that_dies_is_named_at_once(code: int, line: str) -> None:
    run_on_ranks(process, 2)
    started = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_on_ranks(exit_on, 2, 1, code)
    assert time.monotonic() - started < 10
    lines = str(caught.value).splitlines()
    assert lines[0] == f"exit_on on 2 ranks: rank 1 {line}"
    assert lines[1].startswith("rank 0 raised RuntimeError: ")
    assert "--- rank 0:" in lines  # it may know more of it


def test_a_rank_that_died_between_two_calls_is_named() -> None:
    (first, second), nursery = run_on_ranks(process, 2), ranks._nursery
    os.kill(second, signal.SIGKILL)
    assert nursery is not None
    nursery.death(second, 10.0)
    with pytest.raises(RankError, match="process on 2 ranks: rank 1 was killed by SIGKILL"):
        run_on_ranks(process, 2)
    assert first not in run_on_ranks(process, 2)


def test_a_rank_that_hangs_is_shown_where_it_does() -> None:
    run_on_ranks(process, 2)
    started = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_on_ranks(wait_for_rank, 2, 0, timeout_s=2.0)
    assert time.monotonic() - started < 10
    text = str(caught.value)
    head, stack_of_0, stack_of_1 = text.partition("\n--- output")[0].split("\n--- rank ")
    assert head.splitlines()[0] == "wait_for_rank on 2 ranks: not done after 2 s"
    assert "in wait_for_rank" in head.splitlines()[1]
    assert stack_of_0.startswith("0:")
    assert "in wait_for_rank" in stack_of_0
    assert " in barrier" not in stack_of_0
    assert " in barrier" in stack_of_1
    assert text.endswith("--- output of rank 0:\nrank 0 never comes")


def test_a_rank_that_waits_for_one_that_failed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_GRACE_S", 0.5)
    with pytest.raises(RankError) as caught:
        run_on_ranks(fail_alone, 2, timeout_s=30.0)
    lines = str(caught.value).splitlines()
    assert lines[0] == "fail_alone on 2 ranks: rank 1 raised ValueError: alone"
    assert lines[1].startswith("rank 0 was still running: File ")
    assert lines[1].endswith(" in fail_alone")


def test_a_test_that_is_interrupted_leaves_no_rank() -> None:
    """As pytest-timeout interrupts it: by an exception out of a signal handler, which is no OSError: one that came
    while a rank is sent its call would be taken for that of a rank that has died."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise pytest.fail.Exception("interrupted")

    before = [os.pidfd_open(pid) for pid in run_on_ranks(process, 2)]
    handler = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(pytest.fail.Exception, match="interrupted"):
            run_on_ranks(signal_and_hang, 2, os.getpid())
    finally:
        signal.signal(signal.SIGUSR1, handler)
    for pidfd in before:
        assert select.select([pidfd], [], [], 0)[0]
        os.close(pidfd)
    assert run_on_ranks(add_up, 2, 0.0) == [(0, 1.0), (1, 1.0)]


def test_what_a_failing_rank_started_ends_with_it(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="exited with code 4"):
        run_on_ranks(start_a_process, 2, tmp_path / "pid")
    assert read(int((tmp_path / "pid").read_text()), "cmdline") == b""  # which even a zombie has not


def test_results_that_cannot_travel_are_refused() -> None:
    with pytest.raises(
        RankError, match=r"TypeError: result of open_file cannot be pickled: .* - return tensors or plain"
    ):
        run_on_ranks(open_file, 2)


def test_what_cannot_be_handed_to_another_process_is_refused() -> None:
    def local() -> None: ...

    with pytest.raises(TypeError, match=r"local and its arguments cannot be pickled: .* move it to the top level"):
        run_on_ranks(local, 2)
    with pytest.raises(TypeError, match=r"<lambda> and its arguments cannot be pickled: .* move it to the top level"):
        run_on_ranks(lambda: None, 2)
    with open(os.devnull) as file, pytest.raises(TypeError, match=r"add_up and its arguments .* as plain data"):
        run_on_ranks(add_up, 2, file)


def test_modules_that_ranks_cannot_be_forked_with_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = "from threading import Event, Thread\nThread(target=Event().wait, daemon=True).start()\n"
    (tmp_path / "starts_a_thread.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    for name, line in (("starts_a_thread", r"started 1 threads, whose locks a fork would copy"), ("none", "No module")):
        with monkeypatch.context() as patch:  # another nursery, for this one call
            patch.setattr(ranks, "_nursery", None)
            patch.setattr(ranks, "_pools", {})
            patch.setattr(ranks, "PRELOAD", (name,))
            with pytest.raises(RankError, match=rf"(?s)the process that forks ranks ended with code 1\n.*{line}"):
                run_on_ranks(process, 2)


def test_no_process_outlives_a_session_wherever_it_starts(tmp_path: Path) -> None:
    """A project whose tests lie deep, as ours do, and run into pytest-timeout."""
    options = f'[tool.pytest.ini_options]\npythonpath = [".", "{ROOT}"]\naddopts = "--import-mode=importlib"'
    (tmp_path / "pyproject.toml").write_text(options)
    (tmp_path / "trials" / "deep").mkdir(parents=True)
    (tmp_path / "trials" / "deep" / "test_deep.py").write_text(DEEP)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path / "trials")]
    environ = os.environ | {MARK: str(tmp_path)}
    done = subprocess.run(command, cwd="/", env=environ, capture_output=True, text=True, check=False)
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "Failed: Timeout (>1.0s) from pytest-timeout" in done.stdout
    assert processes(tmp_path) == []


def test_no_process_outlives_a_session_that_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "told"
    os.mkfifo(told)
    fifo = os.open(told, os.O_RDWR)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests import ranks; ranks.PRELOAD = ('torch',)\n"
        f"from pathlib import Path; ranks.run_on_ranks(Path.write_text, 2, Path({str(told)!r}), 'ready')\n"
        f"import time; ranks.run_on_ranks(time.sleep, 2, 600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ | {MARK: str(tmp_path)}) as session:
        assert select.select([fifo], [], [], 60)[0], "no rank came up within 60 s"
        os.close(fifo)
        pidfds = [os.pidfd_open(pid) for pid in processes(tmp_path)]
        session.kill()
        assert len(pidfds) == 4  # the session, the nursery and two ranks
        for pidfd in pidfds:
            assert select.select([pidfd], [], [], 10)[0]
            os.close(pidfd)
    assert processes(tmp_path) == []


@pytest.mark.parametrize("world_size", [8, 64, 1024])
def test_fake_ranks_are_as_many_as_one_likes(world_size: int) -> None:
    with fake_ranks(world_size):
        assert (dist.get_rank(), dist.get_world_size()) == (0, world_size)
        mesh = init_device_mesh("cpu", (world_size // 4, 4), mesh_dim_names=("data", "tensor"))
        assert distribute_tensor(torch.ones(world_size), mesh["data"], [Shard(0)]).to_local().numel() == 4
        dist.all_reduce(torch.ones(1))
    assert not dist.is_initialized()


def test_fake_ranks_forget_the_meshes_of_the_group_before() -> None:
    for _ in range(2):
        with fake_ranks(8):
            mesh = init_device_mesh("cpu", (8,))
            tensor = distribute_tensor(torch.ones(8), mesh, [Shard(0)])
            doubled = tensor + tensor
            assert isinstance(doubled, DTensor)
            assert doubled.device_mesh is mesh


def test_fake_ranks_need_a_process_without_a_group() -> None:
    with fake_ranks(2), pytest.raises(RuntimeError, match=r"fake_ranks\(4\): .* group already - destroy that first"):  # noqa: SIM117
        with fake_ranks(4):
            pass


# ---- what the ranks do -----------------------------------------------------------------------------------------------
def add_up(offset: float) -> tuple[int, float]:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def process() -> int:
    return os.getpid()


def where() -> Place:
    assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (place().rank, place().world_size, "gloo")
    return place()


def meet_at_the_master_port() -> None:
    port = place().port
    if place().rank == 0:
        listener = socket.create_server(("", port))
    dist.barrier()
    socket.create_connection((place().address, port), timeout=10).close()
    dist.barrier()
    if place().rank == 0:
        listener.close()


def surroundings() -> tuple[str | None, str | None, str | None, str | None, int, bool, str]:
    names = ("LLM_RUN_ID", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    first, second, third, fourth = map(os.environ.get, names)
    return first, second, third, fourth, torch.get_num_threads(), torch.cuda.is_available(), str(Path.cwd())


def state() -> list[Any]:
    fixed = [os.getpid(), dict(os.environ) | {"MASTER_PORT": ""}, str(Path.cwd()), torch.get_num_threads()]
    return [*fixed, torch.rand(1).item(), torch.rand(1).dtype, np.random.random(), random.random()]


def disturb() -> None:
    os.environ["LLM_RUN_ID"] = "left"
    del os.environ["PATH"]
    os.chdir("/")
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)


def leave_groups_behind(n: int) -> None:
    for _ in range(n):
        dist.new_group()


def raise_on(rank: int) -> None:
    print(f"rank {dist.get_rank()} was here")
    if dist.get_rank() == rank:
        raise KeyError("the cause")
    dist.barrier()


def exit_on(rank: int, code: int) -> None:
    dist.barrier()
    if dist.get_rank() == rank:
        if code < 0:
            os.kill(os.getpid(), -code)
        os._exit(code)
    dist.barrier()


def wait_for_rank(absent: int) -> None:
    if dist.get_rank() == absent:
        print(f"rank {absent} never comes")
        signal.pause()
    dist.barrier()


def fail_alone() -> None:
    if dist.get_rank() == 1:
        raise ValueError("alone")
    signal.pause()


def signal_and_hang(pid: int) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        os.kill(pid, signal.SIGUSR1)
    signal.pause()


def start_a_process(pid_file: Path) -> None:
    if dist.get_rank() == 0:
        pid_file.write_text(str(subprocess.Popen(["sleep", "60"]).pid))
        os._exit(4)


def open_file() -> IO[str]:
    return open(os.devnull)


# ---- who is there ----------------------------------------------------------------------------------------------------
def processes(mark: Path) -> list[int]:
    """Those that were started with this mark, or forked from one that was."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if f"{MARK}={mark}".encode() in read(pid, "environ").split(b"\0")]


def read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it has ended
        return b""
