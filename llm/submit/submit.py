"""A run, checked and frozen beside its results, handed to sbatch.

The job does not run the files that were submitted but a copy of them, RUN/jobs/KIND/code, so that a run that waits, or
is queued again, is not changed by what is edited meanwhile.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf

from llm.cluster import jobs, partition
from llm.cluster.slurm import Slurm, cluster_of
from llm.code import commit, copy_code, difference
from llm.command import beside, compose
from llm.config import ConfigError, made_run_id, split_flags
from llm.config.mistake import line
from llm.exit import EXISTS
from llm.submit.batch import RUNS, SCRIPT, BatchJob, Kind, Runs, written
from llm.submit.combinations import combinations
from llm.submit.record import Job, Record

if TYPE_CHECKING:
    from llm.plan.plan import Plan

# What names a run is a folder, a job and a W&B run: no name needs more, and none of these means anything to a shell.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*(/[A-Za-z0-9_+-][A-Za-z0-9_.+-]*)*")
_OWN = "config-dir"
_CLUSTER = re.compile(r"\+*cluster[.=@]")


class SubmittedError(ValueError):
    """The run has a job that waits or is at work."""

    exit_code = EXISTS


def planned(
    kind: Kind, arguments: Sequence[str], *, n_shares: int | None = None, after: Sequence[str] = ()
) -> BatchJob:
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
    swept = combinations(split_flags(arguments)[1]) if kind == "sweep" else None
    cfg = compose(["-m", *arguments] if kind == "sweep" else arguments, sweeps=True)  # of a sweep that of the first run
    cluster = cluster_of(cfg)
    name = _named(cfg, kind)
    run_dir = Path(cfg.run_dir) if kind == "train" else Path("runs") / name.name
    refuse_live(run_dir, kind)
    asked = [[text for text in words if _CLUSTER.match(text)] for words in swept or []]
    mistakes = [*_following(arguments), *name.mistakes, *_one_cluster(asked)]
    cost = None
    if kind != "prepare":
        cost, wrong = _examined(cfg, costs=not mistakes)
        mistakes += wrong
    if mistakes:
        raise ConfigError(mistakes)
    cfg.trainer.num_nodes, cfg.trainer.devices = cluster.nodes, cluster.ranks_per_node
    n_tasks = n_shares if swept is None else len(swept)
    frozen = [] if kind in ("prepare", "sweep") else name.overrides
    if kind == "sweep":  # each task is called after the sweep and its own number
        arguments = [text for text in arguments if not re.match(r"\+*run_name=", text)]
    own, kept = _own_files(arguments, run_dir / jobs.FOLDER / kind)
    sized = _sized(cluster, kind)
    kept += frozen
    return BatchJob(kind, name.name, run_dir, kept, sized, n_tasks, jobs_before, cfg, own, swept=swept, cost=cost)


def array(
    name: str, run_dir: Path, commands: dict[int, list[str]], configs: list[DictConfig], at_once: int
) -> BatchJob:
    """An array of runs in `run_dir`, each a task with the number and the command line that `commands` gives it.

    Raises:
        ConfigError: with everything that can be told to be wrong with one of them before the job starts.
    """
    clusters = [cluster_of(cfg) for cfg in configs]
    mistakes = [*_nameable(name, run_dir), *_one_cluster(clusters)]
    names = (f"sweep-{min(commands)}{f'-{n}' * bool(n)}" for n in count())
    label = next(name for name in names if not (run_dir / jobs.FOLDER / name).exists())
    folder, own = run_dir / jobs.FOLDER / label, None
    kept = {}
    for number, words in commands.items():
        mistakes += _following(words)
        own, kept[number] = _own_files(words, folder)
    for number, cfg in enumerate(configs):  # what a run costs takes a second: of the first one
        mistakes += [] if mistakes else _examined(cfg, costs=number == 0)[1]
    if mistakes:
        raise ConfigError(mistakes)
    arguments = ["--file", str((folder / RUNS).absolute())]
    runs = Runs(label, kept, at_once)
    return BatchJob("sweep", name, run_dir, arguments, clusters[0], len(kept), (), None, own, runs)


def _own_files(arguments: Sequence[str], folder: Path) -> tuple[Path | None, list[str]]:
    """The folder that --config-dir names, and the arguments with that of its copy in its place."""
    given, _ = get_args_parser().parse_known_args(list(arguments))
    if given.config_dir is None:
        return None, list(arguments)
    copy = str((folder / _OWN).absolute())
    replaced = {given.config_dir: copy, f"--config-dir={given.config_dir}": f"--config-dir={copy}"}
    return Path(given.config_dir), [replaced.get(text, text) for text in arguments]


def submit(job: BatchJob) -> jobs.Submission:
    """Freeze what the job runs, and hand it to sbatch.

    Raises:
        ConfigError: where there is no sbatch, or with what it says if it refuses; if a sweep of this name has begun
            with other jobs.
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
    record = Record(job.run_dir)
    begun = record.path.exists()
    try:
        _freeze(job)
        _enter(job, record)
        id_ = _sbatch(job.folder / SCRIPT)
    except BaseException:
        shutil.rmtree(job.folder)
        if not begun:
            record.path.unlink(missing_ok=True)
        raise
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    made = jobs.Submission(id_, job.kind, job.name, str(job.run_dir), now, commit(), job.arguments, job.n_tasks)
    made.write(job.folder)
    return made


def _enter(job: BatchJob, record: Record) -> None:
    """Write down what each task of a sweep is, for `python -m llm report`."""
    if job.swept is not None:
        record.enter([Job(number, overrides) for number, overrides in enumerate(job.swept)])
        record.about()


def _freeze(job: BatchJob) -> None:
    copy_code(job.folder / "code")
    if job.runs is not None:
        (job.folder / RUNS).write_text(json.dumps(job.runs.commands, indent=1) + "\n")
    if job.own is not None:
        _copy_settings(job.own, job.folder / _OWN, job.run_dir)
    if patch := difference():
        (job.folder / "diff.patch").write_text(patch)
    if job.config is not None:
        (job.folder / "config.yaml").write_text(OmegaConf.to_yaml(job.config, resolve=True))
    (job.folder / SCRIPT).write_text(written(job))


def _copy_settings(own: Path, copy: Path, run_dir: Path) -> None:
    """The YAML of a user's folder, which may hold much else, and the run itself."""
    inside = [path for path in own.rglob("*.y*ml") if path.is_file()]
    copy.mkdir()
    for path in inside:
        if run_dir.resolve() not in path.resolve().parents:
            target = copy / path.relative_to(own)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def _one_cluster(asked: Sequence[object]) -> list[str]:
    """Whether the runs of an array ask SLURM for the same."""
    same = all(one == asked[0] for one in asked)
    return [] if same else [line("cluster", "", "tasks of an array ask for the same", "sweep other keys")]


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


def refuse_live(run_dir: Path, name: str) -> None:
    """Two jobs of one run would wait for each other, or the second be refused by the first one's lock.

    Raises:
        SubmittedError: if the run has such a job that has not ended.
    """
    for folder, before in jobs.submissions(run_dir):
        # Of a sweep also one that train.py -m has begun, whose arrays have names of their own.
        same = folder.name == name or (name == "sweep" and before.kind == "sweep")
        live = [state for state in jobs.states(before.job) if state.live] if same else []
        if live:
            raise SubmittedError(
                f"{run_dir}: job {before.job} of it is {live[0].name} - "
                f"python -m llm cancel {jobs.called(run_dir)} first, or give another run_name"
            )


def _set_aside(job: BatchJob) -> None:
    """Make room for another submission of a run whose last job has ended."""
    refuse_live(job.run_dir, job.folder.name)
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
    named = str(cfg.run_name)
    if kind == "sweep":  # of which the configuration is that of job 0, called after it unless the user named the sweep
        named = named.removesuffix("/0") if named == f"{made}/0" else named
    name = f"prepare-{made}" if kind == "prepare" else named
    mistakes = _nameable(name, Path(str(cfg.run_dir)))
    if kind == "sweep" and str(cfg.run_dir) not in (f"runs/{name}", f"runs/{name}/0"):
        rule, remedy = "is one directory, and each task needs one", "python train.py -m hydra/launcher=slurm has it so"
        mistakes.append(line("run_dir", str(cfg.run_dir), rule, remedy))
    return _Name(name, [f"run_name={name}"] if name == made else [], mistakes)


def _nameable(name: str, run_dir: Path) -> list[str]:
    """What of a name and a place SLURM's scripts, or the file system, could not bear."""
    mistakes = []
    if not _NAME.fullmatch(name):
        rule = "names a folder and a job"
        mistakes.append(line("run_name", repr(name), rule, "letters, digits and . _ - + only, and / between them"))
    where = str(Path.cwd() / run_dir)
    if any(character in where for character in '\n"\\'):
        remedy = 'leave out ", \\ and line breaks'
        mistakes.append(line("run_dir", repr(where), "a script of SLURM's names it", remedy))
    if run_dir.exists() and not run_dir.is_dir():
        mistakes.append(line("run_dir", str(run_dir), "is a file", "name a directory, or one to be made"))
    return mistakes


def _examined(cfg: DictConfig, *, costs: bool = True) -> tuple[Plan | None, list[str]]:
    """What the run will cost, and what cannot be true of it or, if it is to be known what it `costs`, will not work."""
    from llm.plan.remedy import judge
    from llm.plan.subject import Stated

    found = judge(cfg, Stated(), costs=costs)
    return found.plan, found.problems


def _sized(cluster: Slurm, kind: Kind) -> Slurm:
    """A run has the nodes that it asks for; everything else is one process, which takes a rank's GPU or all cores."""
    if kind in ("train", "sweep"):
        return cluster
    if kind == "evaluate" and cluster.gpus_per_node is not None:
        return replace(cluster, nodes=1, gpus_per_node=1)
    cores = cluster.cpus_per_task * (cluster.ranks_per_node if kind == "prepare" else 1)
    return replace(cluster, nodes=1, gpus_per_node=None, gpu_type=None, tasks_per_node=1, cpus_per_task=cores)


def _of_run(kind: Kind, arguments: Sequence[str], after: tuple[str, ...]) -> BatchJob:
    """Of a run that is there, or will be when the job starts."""
    asked = [text for text in arguments if _CLUSTER.match(text)]
    kept = [text for text in arguments if not _CLUSTER.match(text)]
    if not kept or kept[0].startswith("-"):
        raise ConfigError([line(kind, "", "of which run?", f"submit --job {kind} RUN …")])
    run_dir = beside(Path(kept[0]))
    if not Path(kept[0]).is_dir():
        if not after:
            remedy = "--after RUN waits for one that has been submitted"
            raise ConfigError([line(kind, kept[0], "no such directory", remedy)])
        found = jobs.find(str(run_dir))
        kept[0], run_dir = str(found / Path(kept[0]).relative_to(run_dir)), found
    if not _NAME.fullmatch(run_dir.name):
        raise ConfigError([line(kind, repr(run_dir.name), "names a job", "letters, digits and . _ - + only")])
    cluster = _sized(cluster_of(compose(asked, elsewhere=lambda cfg: True)), kind)
    if mistakes := partition.refusals(cluster):
        raise ConfigError(mistakes)
    return BatchJob(kind, f"{kind}-{run_dir.name}", run_dir, kept, cluster, None, after)


def _job_of(name: str) -> str:
    """The id of a job, or of a run's newest that trains, else of its newest."""
    return name if name.isdecimal() else jobs.newest(jobs.find(name))[1].job
