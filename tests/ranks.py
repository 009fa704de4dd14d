"""Any test can be a test of several ranks: `run_on_ranks(fn, 2)` calls `fn` in two processes that share a gloo group.

Importing torch and Lightning takes seconds of CPU, so one process, the *nursery*, imports them once and then forks
ranks, which takes a tenth of a second. The ranks of one world size are a *pool*: they stay for the session and serve
one call after the other, until a call fails or leaves them unfit for another; then the next call gets new ones.

The kernel kills the nursery when pytest ends, however it ends, and the ranks when the nursery ends.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

# What the nursery imports. What a test module imports beyond this costs each rank its time, once.
PRELOAD: tuple[str, ...] = (
    "lightning",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "llm.run",
    "llm.optimizer",
    "pytest",
)
_GRACE_S = 2.0  # for the other ranks to notice that one has failed
_DUMP_S = 5.0  # to print a stack, and to die
# The sockets of a rank that dies are closed before its death is told, so a peer may complain about it a moment earlier.
_DEATH_DELAY_S = 0.2
_MAX_GROUPS = 32  # that calls may leave behind: each holds threads and sockets, but a mesh may still refer to it
_MAX_OUTPUT = 10_000  # characters of a rank's output that are shown
_CPU_ONLY = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
_LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "LLM_LAUNCHER", "LLM_STORE_FD", "NODE_RANK", "GROUP_", "ROLE_")  # set these
_ABORT = "Fatal Python error: Aborted"  # how faulthandler begins, when it is made to show a stack


class RankError(AssertionError):
    """What went wrong on some rank: who failed first and how, then the others, then what all of them printed."""


def run_on_ranks(fn: Callable[..., Any], n: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Call `fn(*args)` on n ranks at once and return their results in the order of the ranks.

    Each rank finds the variables of a rank started by hand, with a MASTER_PORT that is free, the working directory and
    the other variables of the caller, and a default gloo group. A test of how that group is made destroys it first.
    Random generators are seeded with the rank. Nothing else of the test's process is there: no fixture, no monkeypatch.

    Args:
        fn: a function at the top of a module, which each rank imports by name.
        args: for `fn`; like its result they travel as pickles.
        timeout_s: after which the ranks show where they are, and are killed.

    Raises:
        RankError: if `fn` raises, a rank dies or the time is over.
        TypeError: if `fn` or `args` cannot be handed to another process.
    """
    __tracebackhide__ = True
    call = _called(fn, args)
    pool = _pool(n)
    try:
        outcomes = pool.run(call, timeout_s)
    except BaseException:  # pytest-timeout, Ctrl-C: nobody knows what the ranks are doing
        pool.end()
        raise
    printed = pool.printed()
    if not all(outcome.fit for outcome in outcomes):
        pool.end()
    if not all(outcome.kind == "returned" for outcome in outcomes):
        raise RankError(_report(call, outcomes, printed, timeout_s))
    return [pickle.loads(outcome.result) for outcome in outcomes]


@dataclass(frozen=True)
class _Call:
    name: str
    work: bytes  # function and arguments
    environ: dict[str, str]
    directory: str
    path: list[str]


@dataclass(frozen=True)
class _Outcome:
    kind: Literal["returned", "raised", "died", "running"]
    at: float  # time.monotonic(), which all processes of a machine share
    line: str
    detail: str = ""  # traceback or stack
    result: bytes = b""
    fit: bool = False  # for another call


def _called(fn: Callable[..., Any], args: Sequence[Any]) -> _Call:
    name = getattr(fn, "__qualname__", repr(fn))
    try:
        work = pickle.dumps((fn, args))
    except Exception as error:
        raise TypeError(
            f"run_on_ranks: {name} and its arguments cannot be pickled: {error} - ranks import the function by name: "
            f"move it to the top level of its module, and hand what it needs as plain data"
        ) from error
    environ = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHERS)} | _CPU_ONLY
    return _Call(name, work, environ, os.getcwd(), [str(entry) for entry in sys.path])


# ---- in the test's process -------------------------------------------------------------------------------------------
class _Nursery:
    """The test's side of the process that forks ranks."""

    def __init__(self) -> None:
        self.deaths: dict[int, tuple[float, int]] = {}  # of ranks: when, and the exit code or minus the signal
        self.log = os.memfd_create("log")
        # Packets: no message is ever half of one, or two.
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = f"import sys; sys.path[:] = {[str(entry) for entry in sys.path]!r}"
        serve = f"from tests.ranks import _serve; _serve({theirs.fileno()}, {PRELOAD!r})"
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", f"{path}; {serve}"],
            env={**os.environ, **_CPU_ONLY},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for pytest, which then ends its ranks
        )
        theirs.close()
        atexit.register(self.close)

    def fork(self, rank: int, n: int, output: int, store: int) -> tuple[int, Connection]:
        """A new rank's process id, and the way to talk to it."""
        ours, theirs = (Connection(end.detach()) for end in socket.socketpair())
        try:
            socket.send_fds(self.control, [pickle.dumps((rank, n))], [theirs.fileno(), output, store])
            theirs.close()
            return ours.recv(), ours
        except (EOFError, OSError):
            raise self._lost() from None

    def death(self, pid: int, patience_s: float) -> tuple[float, int]:
        """Wait for it, and when patience ends bring it about: when a rank died and how."""
        deadline = time.monotonic() + patience_s
        while pid not in self.deaths:
            if not wait([self.control], max(0, deadline - time.monotonic())):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                deadline += _DUMP_S
            elif message := self.control.recv(4096):
                dead, at, code = pickle.loads(message)
                self.deaths[dead] = at, code
            else:
                raise self._lost()
        return self.deaths[pid]

    def _lost(self) -> RankError:
        self.close()
        return RankError(f"the process that forks ranks ended with code {self.process.returncode}\n{_read(self.log)}")

    def close(self) -> None:
        """End all ranks of all pools."""
        global _nursery
        _nursery = None
        _pools.clear()
        self.control.close()
        self.process.wait()


class _Pool:
    def __init__(self, n: int, nursery: _Nursery) -> None:
        self.nursery = nursery
        self.outputs = [os.memfd_create(f"rank {rank}") for rank in range(n)]
        store = os.memfd_create("store")  # a file that nobody has to delete
        ranks = [nursery.fork(rank, n, output, store) for rank, output in enumerate(self.outputs)]
        os.close(store)
        self.pids, self.links = zip(*ranks, strict=True)

    def run(self, call: _Call, timeout_s: float) -> list[_Outcome]:
        """How the call went on each rank. When one fails, the others get a moment to fail too."""
        self.marks = [os.fstat(output).st_size for output in self.outputs]  # where the output of this call begins
        deadline = time.monotonic() + timeout_s
        n = str(len(self.pids))
        world = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        for rank, link in enumerate(self.links):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | world
            with suppress(OSError):  # it died since the last call, as is seen below
                link.send(replace(call, environ=call.environ | place))
        asked = {link: rank for rank, link in enumerate(self.links)}
        outcomes: dict[int, _Outcome] = {}
        while asked and (ready := wait(list(asked), max(0, deadline - time.monotonic()))):
            for link in ready:
                rank = asked.pop(link)
                outcomes[rank] = self._outcome(rank)
                if outcomes[rank].kind != "returned":
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        for rank in asked.values():
            with suppress(ProcessLookupError):
                os.kill(self.pids[rank], signal.SIGABRT)
        outcomes |= {rank: self._stack(rank) for rank in asked.values()}
        return [outcomes[rank] for rank in range(len(self.pids))]

    def _outcome(self, rank: int) -> _Outcome:
        try:
            return self.links[rank].recv()
        except (EOFError, ConnectionError):
            at, code = self.nursery.death(self.pids[rank], _DUMP_S)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            return _Outcome("died", at - _DEATH_DELAY_S, how)

    def _stack(self, rank: int) -> _Outcome:
        """Where a rank is that was made to show it."""
        self.nursery.death(self.pids[rank], _DUMP_S)
        dump = _read(self.outputs[rank], self.marks[rank]).partition(_ABORT)[2]
        stack = dump.partition("\nExtension modules:")[0].strip()
        main_thread = stack.rpartition("(most recent call first):\n")[2].splitlines() or [" at a place unknown"]
        return _Outcome("running", float("inf"), f"was still running:{main_thread[0][1:]}", stack)

    def end(self) -> None:
        """Kill these ranks and what they started; the next call gets others."""
        _pools.pop(len(self.pids), None)
        for pid in self.pids if self.nursery is _nursery else ():
            self.nursery.death(pid, 0)
        for file in self.outputs:
            os.close(file)

    def printed(self) -> list[str]:
        """What each rank wrote to stdout and stderr in the last call, without the stack that it was made to show."""
        return [text.partition(_ABORT)[0].strip()[-_MAX_OUTPUT:] for text in map(_read, self.outputs, self.marks)]


_nursery: _Nursery | None = None
_pools: dict[int, _Pool] = {}


def _pool(n: int) -> _Pool:
    global _nursery
    _nursery = _nursery or _Nursery()
    if n not in _pools:
        _pools[n] = _Pool(n, _nursery)
    return _pools[n]


def _report(call: _Call, outcomes: Sequence[_Outcome], printed: Sequence[str], timeout_s: float) -> str:
    by_time = sorted(range(len(outcomes)), key=lambda rank: outcomes[rank].at)
    failed = [rank for rank in by_time if outcomes[rank].kind in ("raised", "died")]
    shown = failed[:1] or [rank for rank in by_time if outcomes[rank].kind == "running"]
    if outcomes[shown[0]].kind == "died":  # which leaves no traceback; the first that there is may tell more
        shown += [rank for rank in failed if outcomes[rank].kind == "raised"][:1]
    cause = f"rank {failed[0]} {outcomes[failed[0]].line}" if failed else f"not done after {timeout_s:g} s"
    lines = [f"{call.name} on {len(outcomes)} ranks: {cause}"]
    lines += [f"rank {rank} {outcome.line}" for rank, outcome in enumerate(outcomes) if rank not in failed[:1]]
    lines += [f"\n--- rank {rank}:\n{outcomes[rank].detail.rstrip()}" for rank in shown if outcomes[rank].detail]
    lines += [f"\n--- output of rank {rank}:\n{text}" for rank, text in enumerate(printed) if text]
    return "\n".join(lines)


def _read(file: int, start: int = 0) -> str:
    return os.pread(file, os.fstat(file).st_size, start).decode(errors="replace")


def _free_port() -> str:
    """One that nobody listens on, of those that the kernel gives only to who asks for one by its number."""
    while True:
        port = random.SystemRandom().randrange(10_000, 20_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return str(port)


# ---- in the nursery --------------------------------------------------------------------------------------------------
def _serve(control_fd: int, preload: Sequence[str]) -> None:
    """The life of the nursery: fork ranks when asked, and tell how they end."""
    _die_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in preload:
        importlib.import_module(name)
    if (n_threads := len(os.listdir("/proc/self/task"))) > 1:
        raise RuntimeError(f"importing {preload} started {n_threads - 1} threads, whose locks a fork would copy")
    gc.collect()
    gc.freeze()  # a rank then collects its own garbage in 5 ms, and not in a second of looking at all of torch
    with _lean():
        _fork_when_asked(control_fd)


def _lean() -> AbstractContextManager[None]:
    """For ranks that train."""
    if "llm.run" not in sys.modules:
        return nullcontext()
    from tests.lean import lean

    return lean()


def _fork_when_asked(control_fd: int) -> None:
    control = socket.socket(fileno=control_fd)
    children: dict[int, int] = {}  # pidfd -> pid
    while True:
        for ready in wait([control, *children]):
            if isinstance(ready, int):
                at, pid = time.monotonic(), children.pop(ready)
                os.close(ready)
                control.send(pickle.dumps((pid, at, _bury(pid))))
                continue
            message, fds, *_ = socket.recv_fds(control, 4096, 3)
            if not message:  # the session is over
                for pid in children.values():
                    _bury(pid)
                os._exit(0)
            rank, n = pickle.loads(message)
            pid = _fork(rank, n, fds, (control_fd, *children))
            children[os.pidfd_open(pid)] = pid


def _fork(rank: int, n: int, theirs: Sequence[int], not_theirs: Sequence[int]) -> int:
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)
        for fd in theirs:
            os.close(fd)
        return pid
    link, output, store = theirs
    try:
        _die_with_parent()
        os.dup2(output, 1)
        os.dup2(output, 2)
        for fd in (output, *not_theirs):
            os.close(fd)
        _obey(rank, n, f"/proc/self/fd/{store}", Connection(link))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _bury(pid: int) -> int:
    """Kill a rank, unless it is dead, and what it started; its exit code, or minus the signal."""
    os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG; of an earlier death tells its closed socket


# ---- in a rank -------------------------------------------------------------------------------------------------------
def _obey(rank: int, n: int, store: str, link: Connection) -> None:
    """The life of a rank: one call after the other. The first that fails is the last."""
    import numpy
    import torch
    import torch.distributed as dist

    faulthandler.enable()
    link.send(os.getpid())
    group = None
    while True:
        call = link.recv()
        for seed in (torch.manual_seed, numpy.random.seed, random.seed):
            seed(rank)  # not one seed for all: each rank of a real run starts with its own
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)
        os.environ.clear()
        os.environ.update(call.environ)
        try:
            os.chdir(call.directory)
            if group is None:
                dist.init_process_group("gloo", store=dist.FileStore(store, n), rank=rank, world_size=n)
                group = dist.group.WORLD
            result = _result(call)
        except BaseException as error:
            line = f"raised {type(error).__name__}: {error}".partition("\n")[0]
            link.send(_Outcome("raised", time.monotonic(), line, traceback.format_exc()))
            os._exit(1)  # its sockets closed, the others need not wait for it
        gc.collect()
        gc.freeze()  # mostly modules that the call imported
        fit = dist.group.WORLD is group and len(dist.distributed_c10d._world.pg_map) <= _MAX_GROUPS
        link.send(_Outcome("returned", time.monotonic(), "returned", result=result, fit=fit))


def _result(call: _Call) -> bytes:
    sys.path[:] = call.path
    fn, args = pickle.loads(call.work)
    value = fn(*args)
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise TypeError(f"result of {call.name} cannot be pickled: {error} - return tensors or plain data") from error
