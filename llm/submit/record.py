"""What a sweep knows of its jobs: SWEEP/sweep.jsonl, to which every process of the sweep appends.

Lines are {"sweep": what it is about}, {"job": number, "overrides": [...]}, {"started": number, "log": file} and
{"ended": number, "code": …, "cause": …}; everything else about a job is in its run directory, SWEEP/NUMBER.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm.config.mistake import ConfigError, line

FILE = "sweep.jsonl"
# What a job is does not depend on where it runs or to whom it reports; its name and directory follow from its number.
_ASIDE = re.compile(r"\+*(cluster[.=@]|(run_name|run_dir|callback\.prune)=)")


@dataclass(frozen=True)
class Job:
    """One run of a sweep: what its number makes of the sweep's command line."""

    number: int
    overrides: list[str]

    @property
    def kept(self) -> list[str]:
        """The overrides that make it what it is."""
        return [text for text in self.overrides if not _ASIDE.match(text)]


@dataclass
class Told:
    """A job as the record has it: `log` of its last start; how that ended, if it did, in the eyes of who waited."""

    job: Job
    log: str | None = None
    started: bool = False
    code: int | None = None
    cause: str = ""


@dataclass
class Contents:
    """Everything that a record says."""

    metric: str = "val/loss"
    direction: str = "minimize"
    jobs: dict[int, Told] = field(default_factory=dict)


class Record:
    """The record of the sweep in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE

    def read(self) -> Contents:
        """All of it; a last line that a crash cut short is left out."""
        found = Contents()
        for text in self.path.read_text().splitlines(keepends=True) if self.path.exists() else ():
            if not text.endswith("}\n"):
                continue
            row = json.loads(text)
            if "sweep" in row:
                found.metric, found.direction = row["sweep"]["metric"], row["sweep"]["direction"]
            elif "job" in row:
                found.jobs.setdefault(row["job"], Told(Job(row["job"], row["overrides"])))
            elif "started" in row:
                told = found.jobs[row["started"]]
                told.started, told.log, told.code, told.cause = True, row["log"], None, ""
            else:
                told = found.jobs[row["ended"]]
                told.code, told.cause = row["code"], row["cause"]
        return found

    def about(self, metric: str = Contents.metric, direction: str = Contents.direction) -> None:
        """Say what the sweep is about, unless that is what it was about before."""
        before = self.read()
        if not self.path.exists() or (before.metric, before.direction) != (metric, direction):
            self._append({"sweep": {"metric": metric, "direction": direction}})

    def enter(self, jobs: Sequence[Job]) -> None:
        """Write down what each job is.

        Raises:
            ConfigError: naming those that were something else before.
        """
        there = self.read().jobs
        mistakes = [
            line(
                f"{self.folder}/{job.number}",
                _words(job, before),
                f"was a job with {_words(before, job)}",
                "a sweep goes on with the command that began it; give another run_name",
            )
            for job in jobs
            if job.number in there and sorted((before := there[job.number].job).kept) != sorted(job.kept)
        ]
        if mistakes:
            raise ConfigError(mistakes)
        for job in jobs:
            if job.number not in there:
                self._append({"job": job.number, "overrides": job.kept})

    def started(self, job: Job, log: Path) -> None:
        """A process of the job begins, or is waited for."""
        self._append({"started": job.number, "log": str(log)})

    def ended(self, number: int, code: int | None, cause: str) -> None:
        """It has ended. `code` is None where nobody knows."""
        self._append({"ended": number, "code": code, "cause": cause})

    def _append(self, row: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        cut = self.path.exists() and not self.path.read_bytes().endswith(b"\n")  # by a crash
        with self.path.open("a") as file:
            file.write("\n" * cut + json.dumps(row) + "\n")


def _words(job: Job, other: Job) -> str:
    """The overrides in which a job differs from another."""
    return " ".join(text for text in job.kept if text not in other.kept) or "nothing more"
