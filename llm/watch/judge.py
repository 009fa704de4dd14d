"""When a step has taken too long, and who is late. Time is given: nothing here reads a clock."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from llm.watch.heart import Pulse

_REMEMBERED = 100  # steps, whose median is what a step takes
_GAP_S = 2.0  # between two looks: longer, and this process itself was not running


class Seen(NamedTuple):
    """A rank at one moment: what it says, the kernel's letter for what its main thread does (R, S, D, T …), and whether
    its stack says that it waits for others."""

    pulse: Pulse
    state: str
    waits: bool = False


class Judge:
    """Watches the ranks of one node.

    Args:
        floor_s: no step is too long before.
        factor: nor before so many times the median step.
    """

    def __init__(self, floor_s: float, factor: float) -> None:
        self.floor_s, self.factor = floor_s, factor
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self._first_s = 0.0  # of the longest first step, with all that comes before it
        self._met: dict[int, float] = {}  # when a rank was first seen
        self._before: dict[int, Pulse] = {}
        self._since: dict[int, float] = {}  # when a rank completed its last step, or went to work
        self._now: float | None = None

    @property
    def limit_s(self) -> float:
        """What a step may take; as long as none has been timed, twice the first one, which had more to do."""
        if not self._durations:
            return max(self.floor_s, 2 * self._first_s)
        return max(self.floor_s, self.factor * statistics.median(self._durations))

    def look(self, now: float, ranks: Mapping[int, Seen]) -> float | None:
        """How long the step has taken, once that is too long.

        Not while a rank does something else, since the others wait for it; and the time does not count in which all
        ranks, or this process, were suspended.
        """
        if self._now is not None:
            passed = now - self._now
            if passed > _GAP_S or (ranks and all(seen.state in "Tt" for seen in ranks.values())):
                self._since = {rank: since + passed for rank, since in self._since.items()}
        self._now = now
        for rank, seen in ranks.items():
            self._note(now, rank, seen.pulse)
        if not ranks or not all(seen.pulse.busy for seen in ranks.values()):
            return None
        longest = max(now - self._since[rank] for rank in ranks)
        return longest if longest > self.limit_s else None

    def _note(self, now: float, rank: int, pulse: Pulse) -> None:
        before = self._before.get(rank)
        steps = 0 if before is None or before.pid != pulse.pid else pulse.steps - before.steps
        if before is None or before.pid != pulse.pid:
            self._met[rank] = now
        if steps and before is not None and before.busy and pulse.busy:
            self._durations.append((now - self._since[rank]) / steps)
        elif steps and before is not None and not before.busy and not self._durations:
            self._first_s = max(self._first_s, now - self._met[rank])
        if before is None or steps or not pulse.busy or not before.busy:
            self._since[rank] = now
        self._before[rank] = pulse


def late(ranks: Mapping[int, Seen]) -> list[int]:
    """Whom the others wait for: who has come by the fewest places; of those equally far a stopped one, else those that
    are in no collective, else those that run, as who waits sleeps."""
    fewest = min(seen.pulse.beats for seen in ranks.values())
    behind = {rank: seen for rank, seen in ranks.items() if seen.pulse.beats == fewest}
    stopped = [rank for rank, seen in behind.items() if seen.state in "Tt"]
    alone = [rank for rank, seen in behind.items() if not seen.waits]
    running = [rank for rank in alone or behind if behind[rank].state == "R"]
    return sorted(stopped or running or alone or behind)
