"""The commands of `python -m llm` about jobs that were submitted."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llm.command import Parser


def status(arguments: Sequence[str]) -> None:
    """How submitted jobs are, and how far their runs have come: all of runs/, or those that are named."""
    from llm.cluster import jobs

    parser = Parser("python -m llm status", description=status.__doc__)
    parser.add_argument("run", nargs="*", help="name or directory of a run")
    named = parser.parse_args(list(arguments)).run
    found = [jobs.find(name) for name in named] or jobs.run_dirs()
    table: list[tuple[str, ...]] = [("run", "job", "", "state", "restarts", "step", "loss", "")]
    for run_dir in found:
        for _, made in jobs.submissions(run_dir):
            table += _rows(run_dir, made)
    if len(table) == 1:
        print("no job was submitted from here: python -m llm submit cluster=gpu experiment=…")
        return
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def logs(arguments: Sequence[str]) -> None:
    """Show what a run's job has written; with --follow until it ends."""
    from llm.cluster import jobs

    parser = Parser("python -m llm logs", description=logs.__doc__)
    parser.add_argument("run", help="name or directory of a run")
    parser.add_argument("--follow", action="store_true", help="go on until the job has ended")
    parser.add_argument("--task", type=int, help="of an array")
    parser.add_argument(
        "--job", metavar="KIND", help="of another job than the one that trains: evaluate, export, prepare"
    )
    options = parser.parse_args(list(arguments))
    run_dir = jobs.find(options.run)
    folder, made = jobs.newest(run_dir, options.job)
    if options.task is not None:  # of several arrays of a sweep
        with_it = [pair for pair in jobs.submissions(run_dir) if (pair[0] / f"log-{options.task}.txt").exists()]
        folder, made = with_it[-1] if with_it else (folder, made)
    if (options.task is None) != (made.n_tasks is None):
        parser.error(f"job {made.job} is {'no' if made.n_tasks is None else 'an'} array: --task N goes with an array")
    path = folder / ("log.txt" if options.task is None else f"log-{options.task}.txt")
    read, asked, ended = 0, -math.inf, not options.follow
    while True:
        if not ended and time.monotonic() - asked > 10:  # the controller serves everybody
            ended, asked = not _may_write(made.job), time.monotonic()
        if path.exists():
            with path.open("rb") as file:
                file.seek(read)
                text = file.read()
            read += len(text)
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()
        if ended:
            break
        time.sleep(1.0)
    if read == 0:
        state = (
            ", ".join(f"{state.name} {state.reason}".strip() for state in jobs.states(made.job)) or "unknown to SLURM"
        )
        print(f"{path}: nothing yet; job {made.job} is {state}")


def _may_write(job: str) -> bool:
    """Whether a job may still say something."""
    from llm.cluster import jobs

    try:
        return any(state.live for state in jobs.states(job))
    except jobs.NoAnswerError:
        return True


def cancel(arguments: Sequence[str]) -> None:
    """End a run's job: it saves first, and is not queued again; with --now at once, from the last checkpoint on."""
    from llm.cluster import jobs

    parser = Parser("python -m llm cancel", description=cancel.__doc__)
    parser.add_argument("run", help="name or directory of a run")
    parser.add_argument("--now", action="store_true", help="do not wait until it has saved")
    options = parser.parse_args(list(arguments))
    run_dir = jobs.find(options.run)
    told = [jobs.cancel(folder, made, options.now) for folder, made in jobs.submissions(run_dir)]
    print("\n".join(filter(None, told)) or f"{run_dir}: no job of it waits or is at work")


def _rows(run_dir: Path, made: object) -> list[tuple[str, ...]]:
    """Of one submission: a row, or one for each task of an array."""
    from llm.cluster.jobs import NoAnswerError, State, Submission, progress, states

    assert isinstance(made, Submission)
    rows: list[tuple[str, ...]] = []
    try:
        found = states(made.job) or [State("ended", "no longer known to SLURM")]
    except NoAnswerError:
        found = [State("unknown", "SLURM does not answer")]
    for state in found:
        task_dir = run_dir / state.task if made.kind == "sweep" and state.task.isdecimal() else run_dir
        told = progress(task_dir, made.job)
        if made.kind not in ("train", "sweep"):
            told.pop("end", None)  # which is that of the training
        step = str(told.get("step", "")) + (f"/{told['max_steps']}" if "max_steps" in told else "")
        end = told.get("end")
        note = state.reason or state.nodes
        if end is not None and not state.live:
            note = f"{end['code']}: {end['cause'].splitlines()[0]}"
        job = f"{made.job}_{state.task}" if state.task else made.job
        loss = f"{told['loss']:.4f}" if "loss" in told else ""
        rows.append((str(task_dir), job, made.kind, state.name, str(state.restarts), step, loss, note))
    return rows
