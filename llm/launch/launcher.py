"""The process that a user starts, when there are several ranks: it starts them, waits, and says how the job ended.

A parent that only waits, and loads nothing heavy, is there to see which rank died and of what.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm.config.mistake import ConfigError, line
from llm.exit import final_end, forget, record, version
from llm.launch.place import LAUNCHER, STORE_FD
from llm.launch.verdict import Ended, Verdict, judge
from llm.signals import TOLD

FORWARDED = (signal.SIGINT, *TOLD, signal.SIGQUIT)
GRACE_S = 8.0  # a rank that lost contact says so within one; the job shall have ended within ten
_PR_SET_PDEATHSIG = 1  # of sys/prctl.h


@dataclass(frozen=True)
class _Nodes:
    """This node among those of the job, and where rank 0 hosts the rendezvous store."""

    rank: int
    number: int
    address: str
    port: int


def launch(
    command: Sequence[str],
    n_local: int,
    *,
    run_dir: str | Path,
    n_nodes: int = 1,
    run_id: str | None = None,
    grace_s: float = GRACE_S,
) -> int:
    """Run `command` as `n_local` ranks of one job and give the exit code of the job, having said why on stderr.

    Signals are passed on to the ranks, which have to call `signals.listen`: those that ask a run to go are held back
    until then. Once one has ended before its time, the others have `grace_s` to do so. Only
    the main thread can do this.

    Args:
        run_dir: gets `exit.json` where no rank could write it.
        n_nodes: how many launchers make up the job; NODE_RANK, MASTER_ADDR and MASTER_PORT say which this one is.
        run_id: LLM_RUN_ID of the ranks; None if they have to agree on one among themselves.

    Raises:
        ConfigError: if the three are missing or wrong.
        OSError: naming the rank that could not be started; none stays behind.
    """
    run_dir = Path(run_dir)
    before = version(run_dir)
    with contextlib.ExitStack() as stack:
        store = None if n_nodes > 1 else stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        nodes = _nodes(n_nodes) if store is None else _Nodes(0, 1, *store.getsockname())
        signals = stack.enter_context(signal_numbers())
        ranks = _Ranks(signals, grace_s)
        stack.callback(ranks.end)
        for local_rank in range(n_local):
            listening = store if local_rank == 0 else None
            ranks.start(command, _environment(local_rank, n_local, nodes, run_id, listening), listening)
        if store is not None:
            store.close()  # else it would go on accepting connections when rank 0 is gone
        verdict = judge(ranks.wait(), ranks.forwarded)
    code = final_end(run_dir)
    if verdict.code != 0 and code is not None and version(run_dir) != before:
        return code  # the watchdog has said why
    _tell(verdict, run_dir, before)
    return verdict.code


def die_with_launcher() -> None:
    """Called by a rank at its very start: let it be killed when its launcher is, however that happens."""
    launcher = os.environ.get(LAUNCHER)
    if launcher != str(os.getppid()):
        return  # not a rank of ours, or the launcher is gone already: place() refuses to go on
    die_with_parent()
    if launcher != str(os.getppid()):
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_parent() -> None:
    """Let this process be killed when the one that started it ends, however that happens (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Ranks:
    """The processes. None is reaped before the end, so that a process id keeps meaning what it meant."""

    def __init__(self, signals: socket.socket, grace_s: float) -> None:
        self.signals = signals
        self.grace_s = grace_s
        self.forwarded: list[int] = []
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.living: dict[int, subprocess.Popen[bytes]] = {}
        self.ended: list[Ended] = []
        self.stopped = False

    def start(self, command: Sequence[str], environment: dict[str, str], store: socket.socket | None) -> None:
        """In a session of its own: Ctrl-C of a terminal reaches this process only. The first may read from the
        terminal, as a debugger does."""
        rank = int(environment["RANK"])
        try:
            # A signal that comes before the rank can deal with it waits until it can: `signals.listen`.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, TOLD)
            try:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    start_new_session=True,
                    pass_fds=() if store is None else (store.fileno(),),
                    stdin=None if rank == 0 else subprocess.DEVNULL,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        except OSError as error:
            raise OSError(error.errno, f"rank {rank} could not be started: {error.strerror}: {command[0]}") from error
        self.processes[rank] = self.living[rank] = process

    def wait(self) -> list[Ended]:
        """Until all have ended; how they did, in that order."""
        deadline = math.inf
        while self.living:
            for number in self._received(deadline - time.monotonic()):
                if number == signal.SIGCHLD:
                    self._collect()
                else:
                    self._forward(number)
            if self.ended and deadline == math.inf and not self.stopped:
                deadline = time.monotonic() + self.grace_s
            if time.monotonic() >= deadline:
                self.stopped, deadline = True, math.inf
                self._kill(self.living)
        return self.ended

    def end(self) -> None:
        """Leave nothing behind, whatever happened."""
        self._kill(self.living)
        for process in self.processes.values():
            process.wait()

    def _received(self, timeout_s: float) -> bytes:
        """The numbers of the signals that came, waiting for one if there is none."""
        self.signals.settimeout(None if timeout_s == math.inf else max(timeout_s, 1e-3))
        try:
            return self.signals.recv(4096)
        except TimeoutError:
            return b""

    def _collect(self) -> None:
        for rank, process in list(self.living.items()):
            status = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if status is None:
                continue
            del self.living[rank]
            code = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
            self.ended.append(Ended(rank, process.pid, code, self.stopped))
            if code != 0:  # its loader workers hold its connections open, so that nobody would miss it
                self._kill({rank: process})

    def _forward(self, number: int) -> None:
        self.forwarded.append(number)
        for process in self.living.values():
            os.kill(process.pid, number)

    def _kill(self, ranks: dict[int, subprocess.Popen[bytes]]) -> None:
        """With all that they started, except what has made itself a session, as W&B does to finish its uploads."""
        for process in ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def signal_numbers() -> Iterator[socket.socket]:
    """A socket from which the numbers of the signals to this process are read, in order. Unlike pidfds this needs no
    newer kernel than clusters have, and a signal that comes while ranks are being started waits there."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    wakeup = signal.set_wakeup_fd(writer.fileno())
    # Under nohup a hangup stays ignored; a shell also lets jobs in the background ignore Ctrl-C, but not who sends it.
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    caught = [number for number in FORWARDED if not (nohup and number == signal.SIGHUP)]
    previous = {number: signal.signal(number, lambda *_: None) for number in (*caught, signal.SIGCHLD)}
    try:
        yield reader
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(wakeup)
        reader.close()
        writer.close()


def _nodes(n_nodes: int) -> _Nodes:
    names = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    values = [os.environ.get(name, "") for name in names]
    shown = " ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    remedy = (
        "start one per node with NODE_RANK=… MASTER_ADDR=… MASTER_PORT=…, the host and a free port of node 0, "
        "or use torchrun or srun"
    )
    if not all(values):
        rule = f"this process knows one node only ({shown})"
    elif not (values[0].isdecimal() and int(values[0]) < n_nodes):
        rule = f"NODE_RANK={values[0]} must be between 0 and {n_nodes - 1}"
    elif not (values[2].isdecimal() and 0 < int(values[2]) < 2**16):
        rule = f"MASTER_PORT={values[2]} must be between 1 and 65535"
    else:
        return _Nodes(int(values[0]), n_nodes, values[1], int(values[2]))
    raise ConfigError([line("trainer.num_nodes", str(n_nodes), rule, remedy)])


def _environment(
    local_rank: int, n_local: int, nodes: _Nodes, run_id: str | None, store: socket.socket | None
) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in (STORE_FD, "LLM_RUN_ID")}
    # Each rank would take every core, and all of them wait for each other.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // n_local)))
    environment |= {
        "RANK": str(nodes.rank * n_local + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(nodes.number * n_local),
        "LOCAL_WORLD_SIZE": str(n_local),
        "NODE_RANK": str(nodes.rank),
        "MASTER_ADDR": nodes.address,
        "MASTER_PORT": str(nodes.port),
        LAUNCHER: str(os.getpid()),
    }
    if run_id is not None:
        environment["LLM_RUN_ID"] = run_id
    if store is not None:
        environment[STORE_FD] = str(store.fileno())
    return environment


def _tell(verdict: Verdict, run_dir: Path, before: tuple[int, int] | None) -> None:
    if verdict.text is not None:
        print(verdict.text, file=sys.stderr, flush=True)
    if verdict.unrecorded and run_dir.is_dir():
        with contextlib.suppress(OSError):
            if version(run_dir) == before:
                forget(run_dir)
            record(run_dir, verdict.code, str(verdict.text), verdict.rank)
