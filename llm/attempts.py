"""Every attempt at a run, in `RUN/attempts.jsonl`: when, where, from which step on, and how it ended.

Written by the first process. An attempt whose node was lost has a beginning only.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm.exit import BUG, exit_code

IN_A_ROW = 3  # attempts of one job that may begin at the same step
_FILE = "attempts.jsonl"


class NoProgressError(Exception):
    """A job that SLURM starts again and again comes no further."""

    exit_code = BUG


def begin(run_dir: Path, step: int, world_size: int) -> None:
    """Write down that an attempt begins, at `step`.

    Raises:
        NoProgressError: if this job's last attempts all began there, each of them queued again by itself. Another job,
            or somebody within one, may try again.
    """
    job, restart = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    begun = [row for row in rows(run_dir) if row["event"] == "begin"]
    last = begun[-IN_A_ROW:]
    queued_again = len({restart, *(row["restart"] for row in last)}) == IN_A_ROW + 1
    if job is not None and queued_again and all((row["job"], row["step"]) == (job, step) for row in last):
        raise NoProgressError(
            f"{run_dir}: job {job} began at step {step} {IN_A_ROW} times and came no further - attempts.jsonl and the "
            "log say how each ended - mend that, or checkpoint more often (callback.checkpoint.every_n_train_steps), "
            "and submit it anew"
        )
    where = {"host": socket.gethostname(), "world_size": world_size, "job": job, "restart": restart}
    _append(run_dir, {"event": "begin", "step": step, **where})


def end(run_dir: Path, code: int, cause: str) -> None:
    """Write down how the attempt ended: its exit code, and why."""
    _append(run_dir, {"event": "end", "code": code, "cause": cause})


@contextlib.contextmanager
def attempted(run_dir: Path, *, first: bool) -> Iterator[None]:
    """An attempt that `begin` wrote down: in the `first` process, how the body ends it."""
    try:
        yield
    except BaseException as error:
        if first:
            with contextlib.suppress(OSError):  # a full disk is what ends it, not this
                end(run_dir, exit_code(error), f"{type(error).__name__}: {error}")
        raise
    if first:
        end(run_dir, 0, "finished")


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """All that was written; a last line that a crash cut short is left out."""
    try:
        lines = (run_dir / _FILE).read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def interruptions(run_dir: Path) -> list[dict[str, Any]]:
    """For each attempt but the last: where it began, and how it ended."""
    found: list[dict[str, Any]] = []
    for row in rows(run_dir):
        if row["event"] == "begin":
            kept = {name: row[name] for name in ("step", "host", "world_size", "job", "restart")}
            found.append({**kept, "code": None, "cause": "nobody could say: its node or its first process was lost"})
        elif found:
            found[-1] |= {"code": row["code"], "cause": row["cause"]}
    return found[:-1]


def _append(run_dir: Path, row: dict[str, Any]) -> None:
    path = run_dir / _FILE
    cut = path.exists() and not path.read_bytes().endswith(b"\n")  # by a crash
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps({"at": datetime.now(UTC).isoformat(timespec="seconds"), **row}) + "\n")
