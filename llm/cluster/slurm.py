"""What a job asks SLURM for: `conf/cluster`, and what sbatch makes of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge
from omegaconf import DictConfig

from llm.code import ROOT
from llm.config.mistake import ConfigError, line

# What an option's value may hold: nothing that ends it, or that a shell reads in another way.
_WORD = re.compile(r"[\w.,:=/@%+*\[\]#-]+")
_EXPRESSION = re.compile(r"[\w.,:=/@%+*\[\]#&|()!-]+")  # of features, as --constraint has it; read by sbatch alone
_TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")
_OURS = {
    "account": "cluster.account",
    "array": "--job sweep, or --shares with --job prepare",
    "chdir": "the directory that submit is called in",
    "cpus-per-task": "cluster.cpus_per_task",
    "dependency": "--after RUN",
    "export": "the job needs your environment, or slurm/env.sh makes it: SBATCH_EXPORT",
    "gpus": "cluster.gpus_per_node",
    "gpus-per-node": "cluster.gpus_per_node",
    "job-name": "run_name",
    "mem": "cluster.memory",
    "nodes": "cluster.nodes",
    "ntasks": "cluster.gpus_per_node or cluster.tasks_per_node",
    "partition": "cluster.partition",
    "qos": "cluster.qos",
    "ntasks-per-node": "cluster.gpus_per_node or cluster.tasks_per_node",
    "open-mode": "append: the log of every restart in one file",
    "output": "jobs/…/log.txt in the run directory",
    "requeue": "a run goes on after a lost node",
    "signal": "cluster.warning_s",
    "time": "cluster.time",
}


@dataclass(frozen=True)
class Slurm:
    """Nodes, and for how long.

    nodes           of the job
    gpus_per_node   and ranks on each node; null on nodes without GPUs
    tasks_per_node  ranks on each node without GPUs
    gpu_type        of the GPUs, where a partition has several
    cpus_per_task   of each rank
    memory          of each node, as sbatch's --mem has it; "0": all of it
    time            limit of each attempt, DAYS-HH:MM:SS or HH:MM:SS
    warning_s       how long before it the run saves, leaves and is queued again; SLURM may send it a minute early
    max_requeues    after so many restarts of the job somebody has to look
    container       image for every process
    options         others of sbatch, by their long names; true for one without a value

    Raises ValueError with one line for each key whose value sbatch could not read.
    """

    nodes: Annotated[int, Ge(1)] = 1
    gpus_per_node: Annotated[int, Ge(1)] | None = None
    tasks_per_node: Annotated[int, Ge(1)] | None = None
    gpu_type: str | None = None
    cpus_per_task: Annotated[int, Ge(1)] = 1
    memory: str | int | None = None
    time: str | int = "1-00:00:00"
    warning_s: Annotated[int, Ge(0)] = 300
    max_requeues: Annotated[int, Ge(0)] = 100
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    container: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ValueError("\n".join(problems))

    @property
    def ranks_per_node(self) -> int:
        """One for each GPU, or as many as tasks_per_node says."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def minutes(self) -> float:
        """The time limit."""
        days, _, rest = str(self.time).rpartition("-")
        parts = [int(part) for part in rest.split(":")]
        # sbatch(1): MIN, MIN:SEC, H:M:S, and behind days H, H:M, H:M:S
        per_part = (60, 1, 1 / 60) if days or len(parts) == 3 else (1, 1 / 60)
        return int(days or 0) * 24 * 60 + sum(n * minutes for n, minutes in zip(parts, per_part, strict=False))

    def directives(self, name: str, log: str, directory: str) -> dict[str, str | None]:
        """Options of sbatch, by their long names; None: without a value.

        Args:
            name: of the job.
            log: its file.
            directory: in which it runs.
        """
        gpus = (
            None if self.gpus_per_node is None else f"{f'{self.gpu_type}:' * bool(self.gpu_type)}{self.gpus_per_node}"
        )
        given: dict[str, Any] = {
            "job-name": name,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "nodes": self.nodes,
            "ntasks-per-node": self.ranks_per_node,
            "gpus-per-node": gpus,
            "cpus-per-task": self.cpus_per_task,
            "mem": self.memory,
            "time": self.time,
            "signal": f"USR1@{self.warning_s}" if self.warning_s else None,
            "chdir": directory,
            "output": log,
        }
        found: dict[str, str | None] = {option: str(value) for option, value in given.items() if value is not None}
        found |= {"open-mode": "append", "requeue": None}
        return found | {option: None if value is True else str(value) for option, value in self.options.items()}

    def _problems(self) -> list[str]:
        problems = []
        if (self.gpus_per_node is None) == (self.tasks_per_node is None):
            values = f"{self.gpus_per_node}, tasks_per_node={self.tasks_per_node}"
            problems.append(
                f"cluster.gpus_per_node: {values} - each GPU is one rank's, and nodes without any are told how many "
                "ranks they have - give one of the two (cluster=gpu or cluster=cpu)"
            )
        if self.gpu_type is not None and self.gpus_per_node is None:
            problems.append(f"cluster.gpu_type: {self.gpu_type} - there are no GPUs - set cluster.gpus_per_node")
        for key in ("gpu_type", "memory", "partition", "account", "qos"):
            value = getattr(self, key)
            if value is not None and not _WORD.fullmatch(str(value)):
                problems.append(
                    f"cluster.{key}: {value!r} - sbatch takes a word - letters, digits and . , : = / @ % + -"
                )
        if isinstance(self.time, int):
            rule = "is a number here, as YAML reads 1:30:00 without quotes"
            problems.append(f"cluster.time: {self.time} - {rule} - write it with quotes, minutes as '0:{self.time}:00'")
        elif not _TIME.fullmatch(self.time):
            problems.append(f"cluster.time: {self.time!r} - must be DAYS-HH:MM:SS or HH:MM:SS - write 1-00:00:00")
        elif self.warning_s >= 60 * self.minutes:
            problems.append(
                f"cluster.warning_s: {self.warning_s} - the whole time limit is {60 * self.minutes:.0f} s - "
                "give a longer cluster.time, or 0 for no warning"
            )
        for option, value in self.options.items():
            key = f"cluster.options.{option}"
            if option in _OURS:
                problems.append(f"{key}: {value!r} - is set already - {_OURS[option]}")
            elif not re.fullmatch(r"[a-z][a-z-]+", option):
                problems.append(
                    f"{key}: {value!r} - no long name of an option - write it as sbatch --help does, without --"
                )
            elif value is not True and (value is None or value is False or not _EXPRESSION.fullmatch(str(value))):
                problems.append(f"{key}: {value!r} - sbatch takes a word - true for an option without a value")
        return problems


def cluster_of(cfg: DictConfig) -> Slurm:
    """What a configuration asks SLURM for.

    Raises:
        ConfigError: if it does not say.
    """
    if cfg.cluster is None:
        names = sorted(path.stem for path in (ROOT / "conf" / "cluster").glob("[!_]*.yaml"))
        raise ConfigError([line("cluster", "null", "says what to ask SLURM for", f"cluster={' or '.join(names)}")])
    from hydra.utils import instantiate

    found: Slurm = instantiate(cfg.cluster, _convert_="all")
    return found
