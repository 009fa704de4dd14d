"""The commands of `python -m llm` that plan, that speak with SLURM, and those that its templates call."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm.command import Parser, compose


def plan(arguments: Sequence[str]) -> None:
    """What a run will cost and whether it fits, before it is queued (docs/plan.md): plan cluster=gpu experiment=…"""
    parser = Parser("python -m llm plan", description=plan.__doc__)
    parser.add_argument("--json", action="store_true", help="all figures, for programs")
    parser.add_argument("--search", action="store_true", help="the fastest settings that fit")
    parser.add_argument(
        "--gpu", metavar="NAME", help="as H100; without it cluster.gpu_type, or the GPU of this machine"
    )
    parser.add_argument("--network", choices=("infiniband", "ethernet"), default="infiniband", help="between nodes")
    parser.add_argument("--mfu", type=float, help="share of its peak that one GPU alone reaches; 0.4 for 40 %%")
    parser.add_argument("--tokens-per-s", type=float, metavar="N", help="that one device alone trains on, instead")
    parser.add_argument("--disk", type=float, default=1.0, metavar="GB/S", help="at which checkpoints are written")
    options, overrides = parser.parse_known_args(list(arguments))
    for name, most in (("mfu", 1.0), ("tokens_per_s", None), ("disk", None)):
        value = getattr(options, name)
        if value is not None and not (value > 0 and (most is None or value <= most)):
            parser.error(
                f"--{name.replace('_', '-')} {value}: must be above 0{f' and at most {most:g}' if most else ''}"
            )
    from llm.cluster.remedy import examine, remedies, shortage
    from llm.cluster.search import Setting, search
    from llm.cluster.show import advice, ranking, table
    from llm.cluster.subject import Stated

    stated = Stated(options.gpu, options.network, options.mfu, options.tokens_per_s, options.disk * 1e9)
    found = examine(tuple(overrides), stated)
    mended = remedies(found, stated) if found.problems else []
    problems = list(found.problems)
    fastest: list[Setting] = []
    if found.subject is not None and found.plan is not None:
        problems += shortage(found.subject, found.plan)
        fastest = search(found.subject, stated) if options.search else []
    if options.json:
        figures = None if found.plan is None else found.plan.as_json
        told: dict[str, Any] = {"plan": figures, "problems": problems, "remedies": mended}
        told |= {"search": [asdict(setting) for setting in fastest]} if options.search else {}
        print(json.dumps(told, indent=1))
    else:
        print("\n".join([*([table(found.plan)] if found.plan else []), *ranking(fastest)]))
        print(advice(problems, mended), end="", file=sys.stderr)
    if problems:
        sys.exit(64)


def submit(arguments: Sequence[str]) -> None:
    """Check a run, freeze it, and hand it to SLURM (docs/slurm.md): submit cluster=gpu cluster.nodes=4 experiment=…"""
    from llm.cluster import job as described
    from llm.cluster import submit as submitting

    parser = Parser("python -m llm submit", description=submit.__doc__)
    parser.add_argument("--dry-run", action="store_true", help="check, show the script, and submit nothing")
    parser.add_argument("--job", choices=described.KINDS, default="train", help="which template of slurm/")
    parser.add_argument("--shares", type=int, metavar="N", help="with --job prepare: an array of so many")
    parser.add_argument("--after", action="append", default=[], metavar="RUN", help="start when its job has ended well")
    options, rest = parser.parse_known_args(list(arguments))
    if options.shares is not None and (options.job != "prepare" or options.shares < 1):
        parser.error(f"--shares {options.shares}: goes with --job prepare, and is at least 1")
    job = submitting.planned(options.job, rest, n_shares=options.shares, after=options.after)
    if options.dry_run:
        print(described.written(job))
    id_ = None if options.dry_run else submitting.submit(job).job
    for title, text in described.said(job, id_).items():
        print(f"{title:<6}{text}")
    if id_ is not None:
        name = job.run_dir.name if job.run_dir.parent.name == "runs" else job.run_dir
        print(f"next  python -m llm status {name} | logs {name} --follow | cancel {name}")


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


def where(arguments: Sequence[str]) -> None:
    """Check a command line of train.py, and print the directory of its run: what the templates of slurm/ ask first."""
    print(Path(compose(list(arguments), elsewhere=lambda cfg: True).run_dir))


def combination(arguments: Sequence[str]) -> None:
    """Print the overrides of one run of a sweep, each followed by a NUL: what slurm/sweep.sbatch asks for its task."""
    import json

    from llm.cluster.sweep import combinations
    from llm.config import ConfigError

    parser = Parser("python -m llm combination", description=combination.__doc__)
    parser.add_argument("number", type=int, help="of the run, counted from 0 as python train.py -m does")
    parser.add_argument("--file", type=Path, help="which says what each is: of a sweep by train.py -m")
    options, overrides = parser.parse_known_args(list(arguments))
    if options.file is not None:
        written = json.loads(options.file.read_text())
        if str(options.number) not in written:
            raise ConfigError([f"{options.number}: {options.file} has {', '.join(written)}"])
        sys.stdout.write("".join(f"{word}\0" for word in written[str(options.number)]))
        return
    found = combinations(overrides)
    if not 0 <= options.number < len(found):
        raise ConfigError(
            [f"{options.number}: {' '.join(overrides)} are {len(found)} runs - --array=0-{len(found) - 1}"]
        )
    sys.stdout.write("".join(f"{word}\0" for word in found[options.number]))


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
        step = str(told.get("step", "")) + (f"/{told['max_steps']}" if "max_steps" in told else "")
        end = told.get("end")
        note = state.reason or state.nodes
        if end is not None and not state.live:
            note = f"{end['code']}: {end['cause'].splitlines()[0]}"
        job = f"{made.job}_{state.task}" if state.task else made.job
        loss = f"{told['loss']:.4f}" if "loss" in told else ""
        rows.append((str(task_dir), job, made.kind, state.name, str(state.restarts), step, loss, note))
    return rows
