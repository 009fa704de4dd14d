"""How a job of a sweep is, or ended: read from its run directory, and from what was seen of its processes."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm.cluster.jobs import progress
from llm.exit import INTERRUPTED, LOST, SAVED
from llm.lock import FOLDER, SILENCE_S
from llm.study import finite
from llm.submit.record import Contents, Record, Told

Status = Literal["finished", "pruned", "failed", "interrupted", "running", "waiting"]
DONE: tuple[Status, ...] = ("finished", "pruned")


@dataclass(frozen=True)
class Outcome:
    """`metric` of a job that is done, or the newest of one that is not; `note` says what its status does not."""

    number: int
    status: Status
    code: int | None = None
    note: str = ""
    metric: float | None = None
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether nothing is left to be run."""
        return self.status in DONE


def outcomes(folder: Path) -> tuple[Contents, list[Outcome]]:
    """The record of a sweep, and how each of its jobs is, by number."""
    contents = Record(folder).read()
    return contents, [outcome(folder, contents.jobs[number], contents.metric) for number in sorted(contents.jobs)]


def outcome(folder: Path, told: Told, metric: str) -> Outcome:
    """How one job is."""
    number = told.job.number
    run_dir = folder / str(number)
    end = _read(run_dir / "exit.json")
    if end.get("code") == 0:
        return _of_finished(number, run_dir, metric, end)
    if "code" in end and told.code in (None, end["code"]):
        return _of_unfinished(number, run_dir, metric, end["code"], str(end["cause"]).partition("\n")[0])
    if told.code is not None or told.cause:
        return _of_unfinished(number, run_dir, metric, told.code, told.cause)
    if _alive(run_dir):
        return _of_open(number, run_dir, metric, "running")
    return _of_open(number, run_dir, metric, "interrupted" if (run_dir / "attempts.jsonl").exists() else "waiting")


def _of_finished(number: int, run_dir: Path, metric: str, end: dict[str, Any]) -> Outcome:
    """A run that ended by itself; without the metric it is of no use to the sweep."""
    summary = _read(run_dir / "summary.json")
    if not finite(summary.get(metric)):
        has = ", ".join(name for name, value in summary.items() if finite(value)) or "no number"
        note = f"summary.json: {metric} - {summary.get(metric, 'not there')} - there is {has}"
        return Outcome(number, "failed", 0, note, summary=summary)
    if "pruned" in summary:
        return Outcome(number, "pruned", 0, f"at step {summary['pruned']}", float(summary[metric]), summary)
    note = "" if end["cause"] == "finished" else f"{end['cause']} at step {end['step']}"
    return Outcome(number, "finished", 0, note, float(summary[metric]), summary)


def _of_unfinished(number: int, run_dir: Path, metric: str, code: int | None, cause: str) -> Outcome:
    """One that can go on, or that failed."""
    cause = cause or "left neither exit.json nor a word"
    status: Status = "interrupted" if code in (SAVED, LOST, INTERRUPTED) else "failed"
    return Outcome(number, status, code, cause, _newest(run_dir, metric))


def _of_open(number: int, run_dir: Path, metric: str, status: Status) -> Outcome:
    """One of which no end is known."""
    told = progress(run_dir, "")
    of = f"/{told['max_steps']}" if told.get("max_steps") else ""
    note = f"step {told['step']}{of}" if "step" in told else ""
    return Outcome(number, status, None, note, _newest(run_dir, metric))


def _newest(run_dir: Path, metric: str) -> float | None:
    """The metric as it was measured last."""
    with contextlib.suppress(OSError):
        for text in reversed((run_dir / "metrics.jsonl").read_text().splitlines()):
            with contextlib.suppress(ValueError):
                if finite(value := json.loads(text).get(metric)):
                    return float(value)
    return None


def _alive(run_dir: Path) -> bool:
    """Whether somebody trains in it: who holds its lock touches it every few seconds."""
    for path in (run_dir / FOLDER).glob("*.json"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime < SILENCE_S:
                return True
    return False


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
