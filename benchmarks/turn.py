"""A contestant's side of a contest: work when it is one's turn, and say what it took.

Loaded by every contestant, also by those of other environments: the standard library alone.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

TURN = "BENCHMARK_TURN"  # name of the environment variable that tells a contestant where its contest is


@dataclass(frozen=True)
class Pace:
    """How a contest goes: after `warmup` steps, `rounds` times `steps` of them; the first `checked` losses are told."""

    steps: int
    rounds: int
    warmup: int = 20
    checked: int = 20

    @property
    def n_steps(self) -> int:
        """Of the whole run of a contestant."""
        return self.warmup + self.steps * self.rounds


class Turn:
    """`after_step` is called after every step: it counts, and at the borders of rounds it reports and waits.

    Args:
        rank: which of the contestant's processes this is.
        synchronize: wait until the device has done all it was given; None on a CPU, which has.
        extra: what else is to be told after each round.
    """

    def __init__(
        self,
        rank: int = 0,
        synchronize: Callable[[], None] | None = None,
        extra: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        settings = json.loads(os.environ[TURN])
        self.pace = Pace(**settings["pace"])
        self._synchronize, self._extra = synchronize, extra
        self._losses: list[Any] = []
        self._step = 0
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(settings["socket"])
        self._lines = self._socket.makefile("r")
        self._say(name=settings["name"], rank=rank)

    def after_step(self, loss: Any) -> None:
        """`loss` is the mean of the step, a number or a tensor; it is read at the end of the warm-up."""
        self._step += 1
        if self._step > self.pace.n_steps:
            return
        if self._step <= self.pace.checked:
            self._losses.append(loss)
        if self._step < self.pace.warmup or (self._step - self.pace.warmup) % self.pace.steps:
            return
        if self._step == self.pace.warmup:
            self._sync()
            self._say(losses=[float(value) for value in self._losses])
            self._losses = []
        else:
            self._sync()
            cpu_s, wall_s = time.process_time() - self._cpu, time.perf_counter() - self._wall
            self._say(cpu_s=cpu_s, wall_s=wall_s, **({} if self._extra is None else self._extra()))
        if self._step < self.pace.n_steps:
            self._lines.readline()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    @property
    def done(self) -> bool:
        """Whether this was the last step that counts."""
        return self._step >= self.pace.n_steps

    def _sync(self) -> None:
        if self._synchronize is not None:
            self._synchronize()

    def _say(self, **message: Any) -> None:
        self._socket.sendall((json.dumps(message) + "\n").encode())


def environment(path: str, name: str, pace: Pace) -> dict[str, str]:
    """The variables by which a contestant finds its contest."""
    return {TURN: json.dumps({"socket": path, "name": name, "pace": asdict(pace)})}
