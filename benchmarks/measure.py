"""What a measure is, and how to add one.

A measure is one module in benchmarks/cpu or benchmarks/gpu, whose name is the measure's. It has a docstring, whose
first line is the heading, and

    def measure(session: Session) -> list[Row]

which measures, usually by `session.compete` (contestants side by side), and gives rows. A row with a `Bar` is judged:
the bar stands beside the figure it is for. Nothing is registered: a new file is a new measure, found by `measures`. A
session says how large to be: under `session.smoke` all is tiny, takes seconds, and must run the same code.
"""

from __future__ import annotations

import importlib
import pkgutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from benchmarks import contest
from benchmarks.contest import Contestant, Outcome, Spread
from benchmarks.machine import QUIET, ROOT
from benchmarks.peers import Peers
from benchmarks.turn import Pace


@dataclass(frozen=True)
class Bar:
    """What a figure has to reach."""

    sense: Literal[">=", "<="]
    value: float

    def met(self, figure: float) -> bool:
        return figure >= self.value if self.sense == ">=" else figure <= self.value

    def __str__(self) -> str:
        return f"{self.sense} {self.value:.4g}"


@dataclass(frozen=True)
class Row:
    """One line of the table: a figure, what it comes from, and its bar; `stretch` is a bar that one would like to
    reach. `figures` go to the record only."""

    case: str
    unit: str
    value: Spread
    bar: Bar | None = None
    stretch: Bar | None = None
    note: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Session:
    """What a measure is given.

    folder    of its own, for whatever it writes
    data      where text for the measures lies that want real one; they make some up where it is absent
    cpus      the cores of the contestants
    case      of a measure with several cases, those with this in their names
    deadline  of the whole command, by time.monotonic(); None: as long as it takes
    others    cores that other programs kept busy, round by round
    skipped   what could not be measured, and why: printed and recorded
    """

    folder: Path
    data: Path
    peers: Peers
    cpus: Sequence[int]
    rounds: int = 7
    smoke: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    deadline: float | None = None
    case: str = ""
    skipped: list[str] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    say: Callable[[str], None] = print

    def compete(
        self,
        name: str,
        contestants: Sequence[Contestant],
        *,
        steps: int,
        warmup: int = 20,
        starts: int = 2,
        **options: Any,
    ) -> Outcome:
        """A contest; in a smoke test of few steps. `name` is a folder."""
        if self.smoke:
            steps, warmup, starts = 2, 3, 1
        pace = Pace(steps, self.rounds, warmup, checked=min(warmup, 20))
        options = {"starts": starts, "cpus": self.cpus, "hurried": self.smoke, **options}
        outcome = contest.compete(contestants, pace, self.folder / name, say=self.say, **options)
        self.others += outcome.others
        return outcome

    @property
    def disturbed(self) -> bool:
        """Whether other programs were at work in half of all rounds: more than twice what is allowed at the start, as
        contestants bring programs along (W&B's service, the watchdog's process), whose time is not counted."""
        return bool(self.others) and statistics.median(self.others) > 2 * QUIET

    def n_steps(self, steps: int, warmup: int = 20, starts: int = 2) -> int:
        """How many steps a contestant of `compete` with these arguments makes."""
        if self.smoke:
            steps, warmup, starts = 2, 3, 1
        return warmup + steps * -(-self.rounds // starts)

    def skip(self, line: str) -> None:
        """Say what is not measured."""
        self.skipped.append(line)
        self.say(f"    skipped: {line}")


def measures(device: str) -> dict[str, ModuleType]:
    """Name -> module of every measure of a device, the quickest of them first where they say so (`ORDER`)."""
    folder = ROOT / "benchmarks" / device
    names = [found.name for found in pkgutil.iter_modules([str(folder)]) if not found.name.startswith("_")]
    found = {name: importlib.import_module(f"benchmarks.{device}.{name}") for name in names}
    return {name: found[name] for name in sorted(found, key=lambda name: (getattr(found[name], "ORDER", 99), name))}
