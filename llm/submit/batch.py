"""What is to be submitted, and the batch script that it becomes."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import DictConfig

from llm.cluster import jobs
from llm.cluster.slurm import Slurm
from llm.code import ROOT, commit, difference

if TYPE_CHECKING:
    from llm.plan.plan import Plan

Kind = Literal["train", "sweep", "prepare", "evaluate", "export"]
KINDS: tuple[Kind, ...] = ("train", "sweep", "prepare", "evaluate", "export")
SCRIPT, RUNS = "script.sbatch", "runs.json"


@dataclass(frozen=True)
class Runs:
    """The runs of an array that are no product of its arguments: `commands` by the number of their task, of which so
    many are at work `at_once`; `label` names the job's folder."""

    label: str
    commands: dict[int, list[str]]
    at_once: int


@dataclass(frozen=True)
class BatchJob:
    """What is to be submitted.

    arguments  of the template
    n_tasks    of an array; None: no array
    after      ids of jobs that have to have ended well before it starts
    config     of the run, composed; None where the run is there already
    own        folder of the user's own YAML (--config-dir), which is frozen, too
    runs       of an array, where a file tells each task what it is
    swept      of an array that is a product of its arguments: the overrides of each task
    cost       what python -m llm plan says of a run
    """

    kind: Kind
    name: str
    run_dir: Path
    arguments: list[str]
    cluster: Slurm
    n_tasks: int | None = None
    after: tuple[str, ...] = ()
    config: DictConfig | None = None
    own: Path | None = None
    runs: Runs | None = None
    swept: list[list[str]] | None = None
    cost: Plan | None = None

    @property
    def folder(self) -> Path:
        return self.run_dir / jobs.FOLDER / (self.kind if self.runs is None else self.runs.label)

    @property
    def array(self) -> str | None:
        """As sbatch takes the numbers of an array's tasks."""
        if self.runs is not None:
            return f"{','.join(map(str, self.runs.commands))}%{self.runs.at_once}"
        return None if self.n_tasks is None else f"0-{self.n_tasks - 1}"


def script(job: BatchJob, template: str) -> str:
    """The template, with what this job asks SLURM for, its arguments, and where its code lies."""
    cluster = job.cluster
    folder = str(job.folder.absolute()).replace("%", "%%")
    log = f"{folder}/{'log.txt' if job.n_tasks is None else 'log-%a.txt'}"
    ours: dict[str, str | None] = cluster.directives(job.name.replace("/", "-"), log, str(Path.cwd()))
    if job.array is not None:
        ours["array"] = job.array
    if job.after:
        ours |= {"dependency": f"afterok:{':'.join(job.after)}", "kill-on-invalid-dep": "yes"}
    if job.kind not in ("train", "sweep"):
        ours.pop("signal", None)
    theirs = dict(filter(None, map(_directive, template.splitlines())))
    for option in ("cpus-per-gpu", "ntasks", "signal"):  # what the cluster's keys say, or say not
        theirs.pop(option, None)
    options = theirs | ours
    body = [text for text in template.splitlines() if _directive(text) is None]
    variables = {"LLM_CODE": str(job.folder.absolute() / "code"), "LLM_JOB_FOLDER": str(job.folder.absolute())}
    variables["LLM_MAX_REQUEUES"] = str(cluster.max_requeues)
    if cluster.container is not None:
        variables["LLM_CONTAINER"] = cluster.container
    if job.kind == "sweep":
        variables["LLM_SWEEP_ID"] = job.name
    comments = list(takewhile(lambda text: text.startswith("#"), body[1:]))
    return "\n".join(
        [
            body[0],
            *comments,  # a site's options in a form of their own among them: sbatch reads none behind the first command
            *(f"#SBATCH --{name}" + ("" if value is None else f"={_quoted(value)}") for name, value in options.items()),
            *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
            f'set -- {" ".join(map(shlex.quote, job.arguments))} "$@"',
            *body[1 + len(comments) :],
            "",
        ]
    )


def written(job: BatchJob) -> str:
    """The script of `job`, from its template."""
    return script(job, (ROOT / "slurm" / f"{job.kind}.sbatch").read_text())


def said(job: BatchJob, id_: str | None) -> dict[str, Any]:
    """What the user is told of it, by title."""
    from llm.plan.show import summary

    cluster = job.cluster
    ranks = f"{cluster.nodes} x {cluster.ranks_per_node} ranks" if job.kind in ("train", "sweep") else "1 process"
    array = "" if job.n_tasks is None else f", {job.n_tasks} array tasks"
    log = job.folder / ("log.txt" if job.n_tasks is None else "log-TASK.txt")
    dirty = bool(difference())
    restarts = f"saved {cluster.warning_s} s before the limit and queued again, at most {cluster.max_requeues} times"
    return {
        "job": f"{id_ or '(not submitted)'}: {ranks}{array}, partition {cluster.partition or '(default)'}",
        "run": str(job.run_dir),
        "log": str(log),
        "code": f"{commit() or 'no commit'}{', and diff.patch' if dirty else ''}",
        "time": f"{cluster.time}{f'; {restarts}' if job.kind in ('train', 'sweep') and cluster.warning_s else ''}",
        **({} if job.cost is None else dict(summary(job.cost))),
    } | ({"after": ", ".join(job.after)} if job.after else {})


def _directive(text: str) -> tuple[str, str | None] | None:
    """An option of a template by its long name; what a site writes in another way stays a line of the script."""
    found = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", text.rstrip())
    return None if found is None else (found[1], found[2])


def _quoted(value: str) -> str:
    """As sbatch reads a value: it ends at a space or #, unless in double quotes."""
    plain = re.fullmatch(r"[\w.,:=/@%+*\[\]-]*", value)
    return value if plain else f'"{value}"'
