"""Jobs that `submit` made: where each is written down, how SLURM says it is, and how far its run has come.

RUN/jobs/KIND/ holds script.sbatch, submission.json, log.txt (of an array log-TASK.txt), and what the job runs: code/.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm import attempts
from llm.config.mistake import ConfigError, did_you_mean, line, nearest
from llm.exit import LOST

FOLDER = "jobs"
_PATIENCE_S = 60.0
_RECORD, _CANCELLED = "submission.json", "cancelled"
# States in which a job is, or will be, at work (squeue(1), JOB STATE CODES).
_LIVE = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "SUSPENDED",
    "STOPPED",
    "COMPLETING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
}
_LIVE |= {"REQUEUE_FED", "SIGNALING", "STAGE_OUT", "SPECIAL_EXIT"}


@dataclass(frozen=True)
class Submission:
    """What was handed to sbatch: as `submission.json` has it."""

    job: str
    kind: str
    name: str
    run_dir: str
    submitted: str
    commit: str | None
    arguments: list[str]
    n_tasks: int | None  # of an array

    def write(self, folder: Path) -> None:
        """Whole, or not at all: `status` reads those of all runs."""
        temporary = folder / f".{_RECORD}"
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(temporary, folder / _RECORD)


@dataclass(frozen=True)
class State:
    """How a job, or a task of an array, is: SLURM's words. `nodes` and `reason` may be empty."""

    name: str
    reason: str = ""
    nodes: str = ""
    restarts: int = 0
    task: str = ""
    code: int | None = None  # the exit code of the batch shell, if it left with one

    @property
    def live(self) -> bool:
        """Whether it is at work, or waits."""
        return self.name in _LIVE


def tasks(text: str) -> list[int]:
    """The numbers of what SLURM writes for tasks of an array that wait together: 0,4-6%2, or 0-6:3."""
    numbers: list[int] = []
    for part in text.partition("%")[0].split(","):
        ends, _, stride = part.partition(":")
        first, _, last = ends.partition("-")
        if first.isdecimal():
            numbers += range(int(first), int(last or first) + 1, int(stride or 1))
    return numbers


def submissions(run_dir: Path) -> list[tuple[Path, Submission]]:
    """The jobs of a run, and their folders, oldest first."""
    found = []
    for path in (run_dir / FOLDER).glob(f"*/{_RECORD}"):
        found.append((path.parent, Submission(**json.loads(path.read_text()))))
    return sorted(found, key=lambda pair: pair[1].submitted)


def newest(run_dir: Path, kind: str | None = None) -> tuple[Path, Submission]:
    """The newest job of a run that is of a kind; None: that trains, or if there is none, the newest.

    Raises:
        ConfigError: if there is none of the kind.
    """
    found = submissions(run_dir)
    of_kind = [pair for pair in found if pair[1].kind == kind or (kind is None and pair[1].kind in ("train", "sweep"))]
    if not of_kind and (kind is not None or not found):
        kinds = ", ".join(dict.fromkeys(pair[1].kind for pair in found)) or "none"
        raise ConfigError([line("job", str(kind), f"{run_dir} has no such job", f"there is {kinds}")])
    return (of_kind or found)[-1]


def run_dirs(root: Path = Path("runs")) -> list[Path]:
    """Below `root`, those that jobs were submitted for."""
    return sorted({path.parents[2] for path in root.glob(f"**/{FOLDER}/*/{_RECORD}")})


def called(run_dir: Path, root: Path = Path("runs")) -> str:
    """By what `find` finds it."""
    return str(run_dir.relative_to(root) if run_dir.is_relative_to(root) else run_dir)


def find(name: str, root: Path = Path("runs")) -> Path:
    """The directory of a run by its name, or its path.

    Raises:
        ConfigError: if no job was submitted for it.
    """
    for run_dir in (root / name, Path(name)):
        if (run_dir / FOLDER).is_dir():
            return run_dir
    known = [called(path, root) for path in run_dirs(root)]
    remedy = did_you_mean(nearest(name, known)) or "python -m llm status lists those of runs/"
    raise ConfigError([line("run", name, f"no job was submitted for it from {Path.cwd()}", remedy)])


class NoAnswerError(Exception):
    """SLURM's controller does not answer, so nobody knows how a job is."""

    exit_code = LOST


def states(job: str) -> list[State]:
    """How a job is, task by task if it is an array: from the controller, which forgets what ended long ago, then from
    accounting, where there is any. Empty if nobody knows it.

    Raises:
        NoAnswerError: if the controller cannot be asked.
    """
    command = ["scontrol", "show", "job", "--oneliner", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoAnswerError(f"scontrol does not answer ({error}) - ask again on a login node") from error
    if "JobState=" in done.stdout:
        return [_parsed(row) for row in done.stdout.splitlines() if "JobState=" in row]
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise NoAnswerError(f"scontrol does not answer - ask again later: {done.stderr.strip()}")
    told = slurm("sacct", "--allocations", "--noheader", "--parsable2", "--format=State,NodeList,JobID", "--jobs", job)
    found = []
    for row in (told or "").splitlines():
        name, nodes, id_ = row.split("|")
        found.append(State(name.split()[0], "", nodes, 0, id_.partition("_")[2]))
    return found


def cancel(folder: Path, made: Submission, now: bool) -> str | None:
    """End a job, and say what was done; None if it had ended. A run that is at work saves and leaves.

    SLURM's own way is SIGTERM to all processes, at which srun kills the ranks at once.

    Raises:
        ConfigError: with what scancel says if it refuses.
    """
    found = [state.name for state in states(made.job) if state.live]
    if not found:
        return None
    if not now and made.kind in ("train", "sweep") and "RUNNING" in found:
        (folder / _CANCELLED).touch()  # which the batch shell looks at before it queues the job again
        _scancel("--state=PENDING", made.job)
        _scancel("--full", "--signal=USR1", made.job)  # also the batch shell, while it has no ranks yet
        return f"job {made.job}: told to save and end; --now ends it at once"
    _scancel(made.job)
    return f"job {made.job}: cancelled; submitted again, the run goes on from its last checkpoint"


def _scancel(*arguments: str) -> None:
    done = subprocess.run(["scancel", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(["scancel refused:", *done.stderr.strip().splitlines()])


def slurm(*command: str) -> str | None:
    """What a command of SLURM's prints; None if it is not there, or refuses."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PATIENCE_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def progress(run_dir: Path, job: str) -> dict[str, Any]:
    """The last numbers of a run, and how its attempt in `job` ended: `step`, `loss`, `max_steps`, `end`; what is not
    known is left out."""
    found: dict[str, Any] = {}
    for row in _rows(run_dir / "metrics.jsonl"):
        found["step"] = row["step"]
        if row.get("train/loss") is not None:
            found["loss"] = row["train/loss"]
    mine = False
    for row in attempts.rows(run_dir):
        if row["event"] == "begin":
            found.setdefault("step", row["step"])
            mine = row["job"] == job
        elif mine:
            found["end"] = row
    if "end" not in found:  # of an array, whose tasks have ids of their own, or of one that never came to begin
        with contextlib.suppress(OSError, ValueError):
            found["end"] = json.loads((run_dir / "exit.json").read_text())
    return found | _max_steps(run_dir)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text().splitlines(keepends=True)
    except OSError:
        return
    yield from (json.loads(text) for text in lines if text.endswith("}\n"))


def _max_steps(run_dir: Path) -> dict[str, Any]:
    import yaml

    try:
        return {"max_steps": yaml.safe_load((run_dir / "config.yaml").read_text())["trainer"]["max_steps"]}
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return {}


def _parsed(row: str) -> State:
    """A job as `scontrol show job --oneliner` writes it: Key=value, of which only the wanted ones have no spaces."""
    words = dict(word.partition("=")[::2] for word in row.split())
    nodes = words.get("NodeList", "")
    reason = words.get("Reason", "")
    return State(
        words["JobState"],
        "" if reason in ("None", "(null)") else reason,
        "" if nodes == "(null)" else nodes,
        int(words.get("Restarts", 0)),
        words.get("ArrayTaskId", ""),
        int(words.get("ExitCode", "0:0").partition(":")[0]) or None,
    )
