"""What a partition has, as `sinfo` tells it, against what a job asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llm.cluster.jobs import slurm
from llm.cluster.slurm import Slurm
from llm.config.mistake import did_you_mean, line, nearest


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind in a partition: `gpus` by type, of which "" is any; `minutes` the time limit, None: none."""

    partition: str
    default: bool
    number: int
    cpus: int
    gpus: dict[str, int]
    minutes: float | None


def nodes() -> list[Nodes] | None:
    """All that there are; None where sinfo does not answer."""
    told = slurm("sinfo", "--all", "--noheader", "--format=%P|%D|%c|%G|%l")
    return None if told is None else [_parsed(row) for row in told.splitlines() if row.count("|") == 4]


def refusals(asked: Slurm) -> list[str]:
    """The problems with what there is now; none where nobody can tell."""
    there = nodes()
    return [] if there is None else problems(asked, there)


def problems(asked: Slurm, there: list[Nodes]) -> list[str]:
    """One line for each thing that the partition has not."""
    partitions = {kind.partition for kind in there}
    if asked.partition is not None and not set(asked.partition.split(",")) <= partitions:
        meant = did_you_mean(nearest(asked.partition, partitions)) or f"there are {', '.join(sorted(partitions))}"
        return [line("cluster.partition", asked.partition, "no such partition", meant)]
    names = asked.partition.split(",") if asked.partition else [kind.partition for kind in there if kind.default]
    where = f"partition {', '.join(dict.fromkeys(names))}"
    kinds = [kind for kind in there if kind.partition in names]
    found = []
    n_nodes = sum(kind.number for kind in kinds)
    if kinds and asked.nodes > n_nodes:
        found.append(
            line("cluster.nodes", str(asked.nodes), f"{where} has {n_nodes}", f"at most cluster.nodes={n_nodes}")
        )
    gpus = max((kind.gpus.get(asked.gpu_type or "", 0) for kind in kinds), default=0)
    if kinds and (asked.gpus_per_node or 0) > gpus:
        of_type = f" {asked.gpu_type}" if asked.gpu_type else ""
        remedy = f"at most cluster.gpus_per_node={gpus}" if gpus else "another cluster.partition, or cluster=cpu"
        rule = f"a node of {where} has {gpus or 'no'}{of_type} GPUs"
        found.append(line("cluster.gpus_per_node", str(asked.gpus_per_node), rule, remedy))
    cpus, wanted = max((kind.cpus for kind in kinds), default=0), asked.cpus_per_task * asked.ranks_per_node
    if kinds and wanted > cpus:
        rule = f"{asked.ranks_per_node} ranks take {wanted} cores, and a node of {where} has {cpus}"
        remedy = f"at most cluster.cpus_per_task={cpus // asked.ranks_per_node}" if cpus >= asked.ranks_per_node else ""
        found.append(line("cluster.cpus_per_task", str(asked.cpus_per_task), rule, remedy))
    limits = [kind.minutes for kind in kinds]
    longest = None if None in limits else max((limit for limit in limits if limit is not None), default=None)
    if longest is not None and asked.minutes > longest:
        rule = f"{where} ends jobs after {longest:.0f} minutes"
        found.append(line("cluster.time", str(asked.time), rule, f"at most cluster.time={longest:.0f}"))
    return found


def _parsed(row: str) -> Nodes:
    partition, number, cpus, gres, limit = row.split("|")
    gpus: dict[str, int] = {}
    for type_, count in re.findall(r"\bgpu(?::([^:,()]+))?:(\d+)(?=[(,]|$)", gres):
        gpus[type_] = gpus.get(type_, 0) + int(count)
    gpus[""] = sum(gpus.values())
    minutes = None if limit == "infinite" else Slurm(tasks_per_node=1, time=limit, warning_s=0).minutes
    return Nodes(partition.rstrip("*"), partition.endswith("*"), int(number), int(cpus.rstrip("+")), gpus, minutes)
