"""A run, checked and frozen beside its results, handed to sbatch.

The job does not run the files that were submitted but a copy of them, RUN/jobs/KIND/code, so that a run that waits, or
is queued again, is not changed by what is edited meanwhile.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf

from llm.cluster import jobs, partition
from llm.cluster.slurm import Slurm, cluster_of
from llm.cluster.sweep import combinations
from llm.code import ROOT, commit, copy_code, difference
from llm.command import beside, compose
from llm.config import ConfigError, made_run_id
from llm.config.mistake import line
from llm.exit import EXISTS

if TYPE_CHECKING:
    from llm.cluster.plan import Plan

Kind = Literal["train", "sweep", "prepare", "evaluate", "export"]
KINDS: tuple[Kind, ...] = ("train", "sweep", "prepare", "evaluate", "export")
SCRIPT, _OWN = "script.sbatch", "config-dir"
# What names a run is a folder, a job and a W&B run: no name needs more, and none of these means anything to a shell.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*(/[A-Za-z0-9_+-][A-Za-z0-9_.+-]*)*")
_CLUSTER = re.compile(r"\+*cluster[.=@]")


class SubmittedError(ValueError):
    """The run has a job that waits or is at work."""

    exit_code = EXISTS


@dataclass(frozen=True)
class Job:
    """What is to be submitted.

    arguments  of the template
    n_tasks    of an array; None: no array
    after      ids of jobs that have to have ended well before it starts
    config     of the run, composed; None where the run is there already
    own        folder of the user's own YAML (--config-dir), which is frozen, too
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
    cost: Plan | None = None

    @property
    def folder(self) -> Path:
        return self.run_dir / jobs.FOLDER / self.kind


def planned(kind: Kind, arguments: Sequence[str], *, n_shares: int | None = None, after: Sequence[str] = ()) -> Job:
    """Compose and check what is to be submitted.

    Args:
        kind: which template of slurm/.
        arguments: overrides; of evaluate and export a run and options, with overrides of `cluster` among them.
        n_shares: array tasks that prepare.
        after: names of runs whose newest jobs come first.

    Raises:
        ConfigError: with everything that can be told to be wrong before the job starts.
        SubmittedError: if the run has a job that has not ended.
    """
    jobs_before = tuple(_job_of(name) for name in after)
    if kind in ("evaluate", "export"):
        return _of_run(kind, arguments, jobs_before)
    for variable in ("LLM_RUN_ID", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):  # of the job that this is called in, if it is
        os.environ.pop(variable, None)
    os.environ["LLM_RUN_ID"] = made_run_id()
    swept = combinations(arguments) if kind == "sweep" else [list(arguments)]
    cfg = compose(["-m", *arguments] if kind == "sweep" else arguments)  # of a sweep that of the first run
    cluster = cluster_of(cfg)
    name = _named(cfg, kind)
    run_dir = Path(cfg.run_dir) if kind == "train" else Path("runs") / name.name
    refuse_live(run_dir, kind)
    cost, wrong = (None, []) if kind == "prepare" else _examined(cfg)
    if mistakes := [*_following(arguments), *name.mistakes, *wrong]:
        raise ConfigError(mistakes)
    cfg.trainer.num_nodes, cfg.trainer.devices = cluster.nodes, cluster.ranks_per_node
    n_tasks = len(swept) if kind == "sweep" else n_shares
    frozen = [] if kind in ("prepare", "sweep") else name.overrides
    own, kept = _own_files(arguments, run_dir / jobs.FOLDER / kind)
    return Job(kind, name.name, run_dir, [*kept, *frozen], _sized(cluster, kind), n_tasks, jobs_before, cfg, own, cost)


def _own_files(arguments: Sequence[str], folder: Path) -> tuple[Path | None, list[str]]:
    """The folder that --config-dir names, and the arguments with that of its copy in its place."""
    given, _ = get_args_parser().parse_known_args(list(arguments))
    if given.config_dir is None:
        return None, list(arguments)
    copy = str((folder / _OWN).absolute())
    replaced = {given.config_dir: copy, f"--config-dir={given.config_dir}": f"--config-dir={copy}"}
    return Path(given.config_dir), [replaced.get(text, text) for text in arguments]


def script(job: Job, template: str) -> str:
    """The template, with what this job asks SLURM for, its arguments, and where its code lies."""
    cluster = job.cluster
    folder = str(job.folder.absolute()).replace("%", "%%")
    log = f"{folder}/{'log.txt' if job.n_tasks is None else 'log-%a.txt'}"
    ours: dict[str, str | None] = cluster.directives(job.name.replace("/", "-"), log, str(Path.cwd()))
    if job.n_tasks is not None:
        ours["array"] = f"0-{job.n_tasks - 1}"
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
    return "\n".join(
        [
            body[0],
            *(f"#SBATCH --{name}" + ("" if value is None else f"={_quoted(value)}") for name, value in options.items()),
            *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
            f'set -- {" ".join(map(shlex.quote, job.arguments))} "$@"',
            *body[1:],
            "",
        ]
    )


def written(job: Job) -> str:
    """The script of `job`, from its template."""
    return script(job, (ROOT / "slurm" / f"{job.kind}.sbatch").read_text())


def submit(job: Job) -> jobs.Submission:
    """Freeze what the job runs, and hand it to sbatch.

    Raises:
        ConfigError: where there is no sbatch, or with what it says if it refuses.
        SubmittedError: if the run has a job that has not ended.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError([line("sbatch", "", "is not here", "submit on a login node; --dry-run shows the script")])
    _set_aside(job)
    try:
        job.folder.mkdir(parents=True)
    except FileExistsError:
        raise SubmittedError(
            f"{job.folder}: is being submitted by another process - wait for it, or remove it"
        ) from None
    try:
        _freeze(job)
        id_ = _sbatch(job.folder / SCRIPT)
    except BaseException:
        shutil.rmtree(job.folder)
        raise
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    made = jobs.Submission(id_, job.kind, job.name, str(job.run_dir), now, commit(), job.arguments, job.n_tasks)
    made.write(job.folder)
    return made


def _freeze(job: Job) -> None:
    copy_code(job.folder / "code")
    if job.own is not None:
        shutil.copytree(job.own, job.folder / _OWN)
    if patch := difference():
        (job.folder / "diff.patch").write_text(patch)
    if job.config is not None:
        (job.folder / "config.yaml").write_text(OmegaConf.to_yaml(job.config, resolve=True))
    (job.folder / SCRIPT).write_text(written(job))


def _sbatch(path: Path) -> str:
    """The id of the job."""
    # This shell's own job, if it is one, is none of the new one's.
    kept = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"}  # by which the cluster is found
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in kept or not name.startswith(("SLURM_", "LLM_RUN_ID"))
    }
    command = ["sbatch", "--parsable", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise ConfigError(["sbatch refused:", *done.stderr.strip().splitlines()])
    return done.stdout.strip().partition(";")[0]


def refuse_live(run_dir: Path, kind: Kind) -> None:
    """Two jobs of one run would wait for each other, or the second be refused by the first one's lock.

    Raises:
        SubmittedError: if the run has such a job that has not ended.
    """
    for folder, before in jobs.submissions(run_dir):
        live = [state for state in jobs.states(before.job) if state.live] if folder.name == kind else []
        if live:
            raise SubmittedError(
                f"{run_dir}: job {before.job} of it is {live[0].name} - python -m llm cancel {before.name} first, or "
                "give another run_name"
            )


def _set_aside(job: Job) -> None:
    """Make room for another submission of a run whose last job has ended."""
    refuse_live(job.run_dir, job.kind)
    for folder, before in jobs.submissions(job.run_dir):
        if folder == job.folder:
            folder.rename(folder.with_name(f"{folder.name}.{before.job}-{before.submitted.replace(':', '')}"))


def _following(arguments: Sequence[str]) -> list[str]:
    """Keys that follow from the cluster's, and must not be said twice."""
    rules = {"trainer.num_nodes": "cluster.nodes", "trainer.devices": "cluster.gpus_per_node or cluster.tasks_per_node"}
    return [
        line(key, text.partition("=")[2], f"follows from {right}", f"leave it out, and set {right}")
        for text in arguments
        for key, right in rules.items()
        if text.lstrip("+").partition("=")[0] == key
    ]


@dataclass(frozen=True)
class _Name:
    name: str
    overrides: list[str]
    mistakes: list[str]


def _named(cfg: DictConfig, kind: Kind) -> _Name:
    """What the run is called: by its user, or a name that is made now and told the job."""
    made = os.environ["LLM_RUN_ID"]
    name = made if kind == "sweep" else f"prepare-{made}" if kind == "prepare" else str(cfg.run_name)
    mistakes = []
    if not _NAME.fullmatch(name):
        rule = "names a folder and a job"
        mistakes.append(line("run_name", repr(name), rule, "letters, digits and . _ - + only, and / between them"))
    where = str(Path.cwd() / str(cfg.run_dir))
    if any(character in where for character in '\n"\\'):
        remedy = 'leave out ", \\ and line breaks'
        mistakes.append(line("run_dir", repr(where), "a script of SLURM's names it", remedy))
    return _Name(name, [f"run_name={name}"] if name == made else [], mistakes)


def _examined(cfg: DictConfig) -> tuple[Plan | None, list[str]]:
    """What the run will cost, and what cannot be true of it, or will not work."""
    from llm.cluster.plan import plan
    from llm.cluster.remedy import problems
    from llm.cluster.subject import Stated, subject

    try:
        found = subject(cfg, Stated())
    except ConfigError as error:
        return None, [*partition.refusals(cluster_of(cfg)), *error.mistakes]
    made = plan(found, Stated())
    return made, problems(found, made)


def _sized(cluster: Slurm, kind: Kind) -> Slurm:
    """A run has the nodes that it asks for; everything else is one process, which takes a rank's GPU or all cores."""
    if kind in ("train", "sweep"):
        return cluster
    if kind == "evaluate" and cluster.gpus_per_node is not None:
        return replace(cluster, nodes=1, gpus_per_node=1)
    cores = cluster.cpus_per_task * (cluster.ranks_per_node if kind == "prepare" else 1)
    return replace(cluster, nodes=1, gpus_per_node=None, gpu_type=None, tasks_per_node=1, cpus_per_task=cores)


def _of_run(kind: Kind, arguments: Sequence[str], after: tuple[str, ...]) -> Job:
    """Of a run that is there, or will be when the job starts."""
    asked = [text for text in arguments if _CLUSTER.match(text)]
    kept = [text for text in arguments if not _CLUSTER.match(text)]
    if not kept or kept[0].startswith("-"):
        raise ConfigError([line(kind, "", "of which run?", f"submit --job {kind} RUN …")])
    run_dir = beside(Path(kept[0]))
    if not run_dir.is_dir() and not after:
        raise ConfigError(
            [line(kind, kept[0], "no such directory", "--after RUN waits for one that has been submitted")]
        )
    if not run_dir.is_dir():
        run_dir = jobs.find(str(run_dir))
    if not _NAME.fullmatch(run_dir.name):
        raise ConfigError([line(kind, repr(run_dir.name), "names a job", "letters, digits and . _ - + only")])
    cluster = _sized(cluster_of(compose(asked, elsewhere=lambda cfg: True)), kind)
    if mistakes := partition.refusals(cluster):
        raise ConfigError(mistakes)
    return Job(kind, f"{kind}-{run_dir.name}", run_dir, kept, cluster, None, after)


def _job_of(name: str) -> str:
    """The id of a job, or of a run's newest that trains, else of its newest."""
    return name if name.isdecimal() else jobs.newest(jobs.find(name))[1].job


def _directive(text: str) -> tuple[str, str | None] | None:
    """An option of a template by its long name; what a site writes in another way stays a line of the script."""
    found = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", text.rstrip())
    return None if found is None else (found[1], found[2])


def _quoted(value: str) -> str:
    """As sbatch reads a value: it ends at a space or #, unless in double quotes."""
    plain = re.fullmatch(r"[\w.,:=/@%+*\[\]-]*", value)
    return value if plain else f'"{value}"'


def said(job: Job, id_: str | None) -> dict[str, Any]:
    """What the user is told of it, by title."""
    from llm.cluster.show import summary

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
