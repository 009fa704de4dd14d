"""Contestants side by side: separate processes, the same work, turn by turn.

Every contestant runs in a process of its own from its start to its end, and works while the others wait: A, B, A, B …
What counts is the CPU time of its process (all its threads; not that of programs it has started, such as W&B's service)
and, on a GPU, where the host mostly waits, the wall time.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.machine import busy_s, import_path
from benchmarks.turn import Pace, environment

PATIENCE_S = 900.0  # for one message: a warm-up on a slow machine, or a compilation


class ContestError(RuntimeError):
    """A contestant that failed, or that did other work than the rest."""


@dataclass(frozen=True)
class Contestant:
    """A command that trains, and says so through a Turn.

    work      of each step, what is counted: tokens; () counts steps
    group     those of one group must have the same losses; None: nobody is compared
    ranks     how many of its processes report
    """

    name: str
    command: Sequence[str]
    work: Sequence[float] = ()
    group: str | None = "the same model"
    ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """A median with the least and the largest it comes from."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Outcome:
    """What each contestant took in each round, and what it had to do for that."""

    clock: Literal["cpu_s", "wall_s"]
    rounds: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    others: list[float] = field(default_factory=list)  # cores that other programs kept busy, round by round

    def rates(self, name: str) -> list[float]:
        """Work per second of each round."""
        return [told["work"] / told[self.clock] for told in self.rounds[name]]

    def rate(self, name: str) -> Spread:
        return Spread.of(self.rates(name))

    def ratio(self, name: str, other: str) -> Spread:
        """How many times as fast as `other`, of rounds next to each other."""
        return Spread.of([mine / theirs for mine, theirs in zip(self.rates(name), self.rates(other), strict=True)])

    def more_us_per_step(self, name: str, other: str) -> Spread:
        """How much longer a step takes than that of `other`, in microseconds."""
        return Spread.of(self._more(name, other))

    def share_of_more(self, name: str, third: str, other: str) -> Spread:
        """What a step takes beyond that of `other`, in per cent of what `third`'s takes beyond it."""
        pairs = zip(self._more(name, other), self._more(third, other), strict=True)
        return Spread.of([100 * mine / theirs for mine, theirs in pairs])

    def _more(self, name: str, other: str) -> list[float]:
        pairs = zip(self.rounds[name], self.rounds[other], strict=True)
        return [1e6 * (a[self.clock] - b[self.clock]) / a["steps"] for a, b in pairs]

    def figures(self) -> dict[str, Any]:
        """For the record."""
        return {
            "clock": self.clock,
            "rounds": self.rounds,
            "first_losses": {name: losses[:3] for name, losses in self.losses.items()},
            "largest_difference_of_losses": self.differences,
            "cores_busy_with_other_work": Spread.of(self.others).__dict__ if self.others else None,
        }


class _Running:
    """A contestant's process and the lines it says."""

    def __init__(
        self, contestant: Contestant, pace: Pace, folder: Path, cpus: Sequence[int], patience_s: float
    ) -> None:
        self.contestant, self.pace, self.patience_s = contestant, pace, patience_s
        self.log = folder / f"{contestant.name.replace(' ', '-').replace('/', '-')}.log"
        path = folder / "turn.sock"
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        settings = os.environ | {
            **environment(str(path), contestant.name, pace),
            **{name: str(len(cpus)) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": import_path(),
            "PYTHONWARNINGS": "ignore",
            **contestant.environment,
        }
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                contestant.command,
                cwd=folder,
                env=settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: os.sched_setaffinity(0, cpus),
            )
        self._unread: dict[socket.socket, str] = {}
        self._told: dict[socket.socket, list[dict[str, Any]]] = {}
        self._ranks: dict[int, socket.socket] = {}

    def heard(self) -> list[dict[str, Any]]:
        """The next message of every rank."""
        deadline = time.monotonic() + self.patience_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            for connection in self._unread:
                selector.register(connection, selectors.EVENT_READ)
            while not self._all_told():
                for key, _ in selector.select(timeout=0.2):
                    if key.fileobj is self._listener:
                        connection, _ = self._listener.accept()
                        self._unread[connection], self._told[connection] = "", []
                        selector.register(connection, selectors.EVENT_READ)
                    elif not self._receive(key.fileobj):
                        selector.unregister(key.fileobj)
                if not self._all_told() and (self._process.poll() is not None or time.monotonic() > deadline):
                    raise self._failure()
        return [self._told[self._ranks[rank]].pop(0) for rank in sorted(self._ranks)]

    def _all_told(self) -> bool:
        return len(self._ranks) == self.contestant.ranks and all(self._told[each] for each in self._ranks.values())

    def _receive(self, connection: Any) -> bool:
        """Whole lines become messages; the first of a rank says which one it is. False: it has hung up, as the first
        rank to be done may."""
        received = connection.recv(1 << 16).decode()
        *lines, self._unread[connection] = (self._unread[connection] + received).split("\n")
        for message in map(json.loads, lines):
            if "rank" in message:
                self._ranks[message["rank"]] = connection
            else:
                self._told[connection].append(message)
        return bool(received)

    def round(self, number: int) -> dict[str, float]:
        """Let it work for one round; CPU time is that of all ranks, wall time that of the slowest."""
        for connection in self._ranks.values():
            connection.sendall(b"go\n")
        told = self.heard()
        first = self.pace.warmup + number * self.pace.steps
        work = self.contestant.work
        done = sum(work[first : first + self.pace.steps]) if work else self.pace.steps
        largest = {name: max(message[name] for message in told) for name in told[0]}
        return {**largest, "cpu_s": sum(m["cpu_s"] for m in told), "steps": self.pace.steps, "work": done}

    def leave(self) -> None:
        """Wait for its end, which is to be a good one."""
        try:
            code = self._process.wait(timeout=self.patience_s)
        except subprocess.TimeoutExpired:
            raise self._failure() from None
        if code != 0:
            raise self._failure()

    def close(self) -> None:
        """Nothing is left running."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for opened in (*self._unread, self._listener):
            opened.close()

    def _failure(self) -> ContestError:
        code = self._process.poll()
        what = f"said nothing for {self.patience_s:.0f} s" if code is None else f"ended with code {code}"
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
        return ContestError(f"{self.contestant.name} {what}; the end of what it printed:\n{tail}")


def compete(
    contestants: Sequence[Contestant],
    pace: Pace,
    folder: Path,
    *,
    cpus: Sequence[int],
    starts: int = 1,
    tolerance: float = 1e-4,
    clock: Literal["cpu_s", "wall_s"] = "cpu_s",
    apart: bool = False,
    hurried: bool = False,
    patience_s: float = PATIENCE_S,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Outcome:
    """Run the contest.

    Args:
        pace: of the whole contest; its rounds are spread over the starts.
        folder: where contestants work and what they print is kept.
        cpus: the cores they may use, as many threads each.
        starts: how often all are started anew: one process may be luckier with its memory than the next.
        tolerance: by how much the losses of one group may differ, step by step.
        hurried: warm up all at the same time: where nothing depends on the figures.
        apart: one after the other, not turn by turn: where two do not fit the device.
        patience_s: for one message, as the one at the end of the warm-up.

    Raises ContestError if one fails, or if losses of one group differ by more.
    """
    outcome = Outcome(clock, {c.name: [] for c in contestants})
    folder.mkdir(parents=True, exist_ok=True)
    shares = [pace.rounds // starts + (number < pace.rounds % starts) for number in range(min(starts, pace.rounds))]
    for share in shares:
        own = Pace(pace.steps, share, pace.warmup, pace.checked)
        losses: dict[str, list[float]] = {}
        teams = [[contestant] for contestant in contestants] if apart else [list(contestants)]
        for team in teams:
            _meet(team, contestants, own, folder, cpus, outcome, losses, say, hurried, tolerance, patience_s)
    return outcome


def _meet(
    team: Sequence[Contestant],
    met: Sequence[Contestant],
    pace: Pace,
    folder: Path,
    cpus: Sequence[int],
    outcome: Outcome,
    losses: dict[str, list[float]],
    say: Callable[[str], None],
    hurried: bool,
    tolerance: float,
    patience_s: float,
) -> None:
    """Start each, let it warm up alone, compare its losses with those of all that have been `met`, then take turns."""
    running: list[_Running] = []
    try:
        for contestant in team:
            where = folder / str(len(list(folder.iterdir())))
            where.mkdir()
            running.append(_Running(contestant, pace, where, cpus, patience_s))
            if not hurried:
                say(f"    {contestant.name}: warming up")
                losses[contestant.name] = running[-1].heard()[0]["losses"]
        if hurried:
            losses |= {each.contestant.name: each.heard()[0]["losses"] for each in running}
        _agree([contestant for contestant in met if contestant.name in losses], losses, tolerance, outcome)
        for number in range(pace.rounds):
            for each in running:
                before, start = busy_s(), time.monotonic()
                told = each.round(number)
                others = (busy_s() - before - told["cpu_s"]) / (time.monotonic() - start)
                outcome.others.append(max(0.0, others))
                outcome.rounds[each.contestant.name].append(told)
        for each in running:
            each.leave()
    finally:
        for each in running:
            each.close()


def _agree(
    contestants: Sequence[Contestant], losses: dict[str, list[float]], tolerance: float, outcome: Outcome
) -> None:
    """Equal losses are equal work."""
    outcome.losses |= losses
    first: dict[str, str] = {}
    for contestant in contestants:
        if contestant.group is None:
            continue
        reference = first.setdefault(contestant.group, contestant.name)
        worst = largest_difference(losses[contestant.name], losses[reference])
        outcome.differences[contestant.name] = max(worst, outcome.differences.get(contestant.name, 0.0))
        if not worst <= tolerance:
            raise ContestError(
                f"{contestant.name} and {reference} do other work: their losses differ by {worst:.2e} within the first "
                f"{len(losses[reference])} steps, and {tolerance:.0e} is allowed:\n"
                f"{losses[contestant.name][:5]}\n{losses[reference][:5]}"
            )


def largest_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """Of losses step by step."""
    return max(abs(one - other) for one, other in zip(losses, others, strict=True))
