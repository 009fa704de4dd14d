"""Where the processes of a run meet before there is a process group, and take leave of each other after it.

A key-value store that rank 0 hosts (under torchrun its agent does). Waiting on it holds no collective open, so it may
take as long as preparing the data takes, and a process that fails can say so to the others.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch.distributed as dist

from llm.config import ConfigError, run_id
from llm.exit import LOST, SAVED, LostPeerError, lost_contact, lost_words
from llm.launch import Place, place

ARRIVAL_S = 60.0  # how long ranks wait for the last of them, all having been started at once
_POLL_S = 0.1
_FAREWELL_S = 30.0
_SILENCE_S = 1.5  # between the first that notices a loss and the last
_FAILURE_S = 5.0  # a host that is gone must not hold up the one that wants to tell it why it leaves

T = TypeVar("T")


class Rendezvous:
    """What the processes of one run tell each other; for a process alone everything is at hand at once.

    Args:
        here: which of the processes this is.
        store: theirs, with keys of this run only; None for a process alone.
    """

    def __init__(self, here: Place, store: dist.Store | None) -> None:
        self.here = here
        self.store = store
        self.left = False  # together with the others

    def arrive(self, patience_s: float = ARRIVAL_S) -> None:
        """Return when every rank has come here.

        Raises:
            LostPeerError: naming the ranks that did not come.
        """
        if self.store is None:
            return
        keys = [f"arrived/{rank}" for rank in range(self.here.world_size)]
        self.store.set(keys[self.here.rank], "")
        try:
            self.store.wait(keys, datetime.timedelta(seconds=patience_s))
        except dist.DistStoreError:
            missing = [str(rank) for rank, key in enumerate(keys) if not self.store.check([key])]
            raise LostPeerError(
                f"rank {', '.join(missing)} of {self.here.world_size} did not arrive within {patience_s:.0f} s "
                f"at {self.here.address}:{self.here.port} - start all of them with the same command, on hosts that "
                f"reach this one; if RANK or WORLD_SIZE are left from another program, unset them"
            ) from None

    def share(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, plain data, to every rank; the others wait, however long it takes."""
        if self.store is None:
            return make()
        if self.here.rank == 0:
            value = make()
            self.store.set(name, json.dumps(value))
            return value
        self._await([name])
        return json.loads(self.store.get(name))

    def once_per_node(self, name: str, make: Callable[[], None]) -> None:
        """Call `make` in the first process of each node; all wait for all nodes, however long it takes."""
        if self.store is None:
            make()
            return
        if self.here.local_rank == 0:
            make()
            self.store.set(f"{name}/{self.here.node_rank}", "")
        self._await([f"{name}/{self.here.node_rank}"])
        # For all nodes: one whose cache is cold needs longer than a process group waits for its last member.
        self.all_here(name)

    def all_here(self, name: str) -> None:
        """Return when every rank has come to here, however long it takes."""
        if self.store is None:
            return
        self.store.add(f"{name}/ready", 1)
        if self.here.rank == 0:
            while self.store.add(f"{name}/ready", 0) < self.here.world_size:
                self._pause()
            self.store.set(f"{name}/all", "")
        self._await([f"{name}/all"])

    def hosts(self) -> list[str]:
        """The name of each rank's host."""
        if self.store is None:
            return [socket.gethostname()]
        keys = [f"host/{rank}" for rank in range(self.here.world_size)]
        self.store.set(keys[self.here.rank], socket.gethostname())
        self._await(keys)
        return [name.decode() for name in self.store.multi_get(keys)]

    def first_to_fail(self, code: int) -> bool:
        """Tell the others that this rank fails, and with which exit code; whether it is the first to, whose message is
        the one to read."""
        if self.store is None or self.left:
            return self.here.rank == 0  # who left together has one reason
        mine = json.dumps([self.here.rank, code])
        try:
            self.store.set_timeout(datetime.timedelta(seconds=_FAILURE_S))
            first = self.store.compare_set("failed", "", mine).decode() == mine
            self.store.set(f"left/{self.here.rank}", "")
        except RuntimeError:  # the host has left, so it failed before this rank; but it may not have said why
            return True
        return first

    @contextlib.contextmanager
    def naming_lost(self) -> Iterator[None]:
        """If a collective in the body fails because a rank is gone, the error that comes out says which one.

        Raises:
            LostPeerError: in place of what the backend raised, which knows an address at best.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, LostPeerError) or not lost_contact(error):
                raise
            # torchrun and srun now end everybody: not before this rank has said and written down which one was lost.
            with contextlib.suppress(ValueError):  # outside the main thread
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            gone, code = self._gone()
            raise _lost(lost_words(error, f"rank {gone}"), code) from error

    def _gone(self) -> tuple[str, int]:
        """The rank that failed, or those that do not say within a moment that they have lost one too; and with which
        exit code, if it said."""
        assert self.store is not None
        silent = set(range(self.here.world_size)) - {self.here.rank}
        deadline = time.monotonic() + _SILENCE_S
        try:
            self.store.set_timeout(datetime.timedelta(seconds=_FAILURE_S))
            self.store.set(f"lost/{self.here.rank}", "")
            while time.monotonic() < deadline and not self.store.check(["failed"]):
                silent -= {rank for rank in silent if self.store.check([f"lost/{rank}"])}
                time.sleep(_POLL_S)
            if self.store.check(["failed"]):
                rank, code = self._failed()
                return str(rank), code
        except RuntimeError:  # the host is gone, or has waited as long as this rank and has left
            if len(silent) == self.here.world_size - 1:
                return "0", LOST
        return ", ".join(map(str, sorted(silent))) or "another", LOST

    def _failed(self) -> tuple[int, int]:
        """Who has failed first, and with which exit code."""
        assert self.store is not None
        rank, code = json.loads(self.store.get("failed"))
        return rank, code

    def see_off(self) -> None:
        """The host of the store stays until the others know that it failed, who could only say that it is gone.

        Not once they train: then they learn it from their collectives, as soon as it has left.
        """
        if self.store is None or self.left or self.here.rank > 0 or dist.is_initialized():
            return
        with contextlib.suppress(RuntimeError):
            self.store.wait(self._all_left(), datetime.timedelta(seconds=_FAILURE_S))

    def leave(self) -> None:
        """Return when every rank has come here too, so that none is killed for lingering; or after a while."""
        self.left = True
        if self.store is None:
            return
        # All is done and saved: who hosts the store may have left a moment ago.
        with contextlib.suppress(RuntimeError):
            self.store.set(f"left/{self.here.rank}", "")
            if self.here.rank == 0:
                self.store.wait(self._all_left(), datetime.timedelta(seconds=_FAREWELL_S))
            else:  # rank 0 may have a summary to write and a logger to finish, for as long as that takes
                self._await(["left/0"])

    def _all_left(self) -> list[str]:
        return [f"left/{rank}" for rank in range(self.here.world_size)]

    def _await(self, keys: list[str]) -> None:
        assert self.store is not None
        while not self.store.check(keys):
            self._pause()

    def _pause(self) -> None:
        assert self.store is not None
        if self.store.check(["failed"]):
            rank, code = self._failed()
            raise _lost(f"rank {rank} {'was told to go' if code == SAVED else 'failed'}", code)
        time.sleep(_POLL_S)


def _lost(text: str, code: int) -> LostPeerError:
    """Who leaves because another was told to go was told so, too: nothing is lost."""
    error = LostPeerError(text, code)
    error.exit_code = SAVED if code == SAVED else LOST
    return error


_connection: tuple[Place, dist.Store] | None = None
_current: Rendezvous | None = None
_sessions = itertools.count()


def meet() -> Rendezvous:
    """Bring the processes of a run together; every one of them calls this equally often.

    Raises:
        ConfigError: if the port is taken.
        LostPeerError: naming who did not come.
    """
    global _current
    here = place()
    session = f"run{next(_sessions)}"
    store = dist.PrefixStore(session, _connect(here)) if here.world_size > 1 else None
    _current = Rendezvous(here, store)
    _current.arrive()
    return _current


def current() -> Rendezvous:
    """Where this run's processes met last; a process that met nobody is alone."""
    return _current or Rendezvous(place(), None)


def first_to_fail(code: int) -> bool:
    """Whether the error that ends this process is the one to show, of those that end the others as well."""
    return place().rank == 0 if _current is None else _current.first_to_fail(code)


def see_off() -> None:
    """What is left to do for a process that fails, and has said so."""
    if _current is not None:
        _current.see_off()


def share_run_id(here: Place) -> None:
    """Give every process the run id that rank 0 makes, before the configuration is composed, which names the run."""
    rendezvous = Rendezvous(here, dist.PrefixStore("run_id", _connect(here)))
    rendezvous.arrive()
    os.environ["LLM_RUN_ID"] = rendezvous.share("run_id", run_id)


def _connect(here: Place) -> dist.Store:
    """The store itself, once a process. Restarted by torchrun, a run is a new meeting in its agent's old store."""
    global _connection
    if _connection is None or _connection[0] != here:
        hosts = here.rank == 0 and not _hosted_by_agent()
        try:
            store: dist.Store = dist.TCPStore(
                here.address,
                here.port,
                world_size=None,
                is_master=hosts,
                timeout=datetime.timedelta(seconds=ARRIVAL_S),
                wait_for_workers=False,
                master_listen_fd=here.store_fd if hosts else None,
            )
        except dist.DistNetworkError as error:
            raise _explained(error, here, hosts) from error
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        _connection = here, dist.PrefixStore(f"llm/{attempt}", store)
    return _connection[1]


def _hosted_by_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _explained(error: Exception, here: Place, hosts: bool) -> Exception:
    where = f"{here.address}:{here.port}"
    if hosts:
        reason = "in use by another program" if "EADDRINUSE" in str(error) else str(error).partition("\n")[0]
        return ConfigError([f"MASTER_PORT: {where} - {reason} - choose another port"])
    return LostPeerError(
        f"rank 0 did not arrive at {where} within {ARRIVAL_S:.0f} s, or rank {here.rank} cannot reach it - "
        f"look at its log, and at MASTER_ADDR and MASTER_PORT"
    )
