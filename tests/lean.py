"""What half of a tiny run is, left out of those in the tests' own processes: that of pytest, and its ranks.

Runs in processes of their own are whole: those that tests start by a command line, and the cluster suite's.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm.callback.plot import Rows, plot_run


@contextmanager
def lean() -> Iterator[None]:
    """Runs draw one picture of a kind, and look through no library's objects for garbage."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("llm.callback.summary.plot_run", _Pictures().plot)
        monkeypatch.setattr("llm.callback.garbage.gc", YOUNG)
        yield


class _Pictures:
    """Ticks and labels take a second: of runs with the same curves the first is drawn, and the others get its
    picture."""

    def __init__(self) -> None:
        self._drawn: dict[frozenset[str], bytes] = {}

    def plot(self, rows: Rows, baselines: Mapping[str, float], path: Path) -> None:
        parts = ("loss", "bits_per_byte", "next_sentence_accuracy")  # of the names that decide what a picture shows
        kind = frozenset(name for name in set(baselines).union(*rows) if any(part in name for part in parts))
        if kind not in self._drawn:
            plot_run(rows, baselines, path)
            self._drawn[kind] = path.read_bytes()
        path.write_bytes(self._drawn[kind])


def _collect(generation: int = 2) -> int:
    return gc.collect(min(generation, 1))


# The collector as the callback sees it: half a million objects of libraries are neither looked through nor, in a rank
# that was forked with them frozen, thawed, by which their pages would be copied.
YOUNG = SimpleNamespace(
    collect=_collect,
    freeze=lambda: None,
    unfreeze=lambda: None,
    enable=gc.enable,
    disable=gc.disable,
    isenabled=gc.isenabled,
)
