"""Which process of a run this one is. Nothing else reads the variables by which launchers say so."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from llm.config.mistake import ConfigError, line

LAUNCHER, STORE_FD = "LLM_LAUNCHER", "LLM_STORE_FD"
_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_STORE = ("MASTER_ADDR", "MASTER_PORT")
_OURS = (LAUNCHER, *_RANK, "LOCAL_WORLD_SIZE", "NODE_RANK", *_STORE, STORE_FD)
_STEP = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
_LAYOUT = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST")
# SLURM_MAX_NORMAL_STEP_ID of slurm.h: above it are the batch script, the extern step and the interactive one.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
# Ports of srun: below those that the kernel hands out (32768), so that no connection of another program holds ours.
_PORTS = range(20_000, 30_000)


@dataclass(frozen=True)
class Place:
    """One process among those of a run.

    `address` and `port` say where rank 0 hosts the rendezvous store; "" and 0 for a process alone. `store_fd` is a
    socket that listens there already. `local_world_size` counts the ranks of this node, the others may have more.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    address: str
    port: int
    launcher: Literal["none", "launch", "torchrun", "srun", "environment"]
    store_fd: int | None = None


ALONE = Place(0, 0, 1, 1, 0, "", 0, "none")


def place() -> Place:
    """What the environment says now: our launcher first, then torchrun, srun, and variables set by hand.

    Raises:
        ConfigError: variables that contradict each other, are incomplete, or were left by another program.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None:
        if launcher != str(os.getppid()):
            rule = f"is set, but the launcher is not the parent of this process, which is {os.getppid()}"
            raise ConfigError([line(LAUNCHER, launcher, rule, f"inherited from a rank, or stale: {_unset(_OURS)}")])
        store_fd = _numbers((STORE_FD,), _OURS)[0] if _given(STORE_FD) else None
        return _numbered("launch", "NODE_RANK", (LAUNCHER,), store_fd)
    if _given("TORCHELASTIC_RUN_ID"):
        return _numbered("torchrun", "GROUP_RANK", ("TORCHELASTIC_RUN_ID",))
    if _n_tasks() > 1:
        return _task_of_step()
    given = [name for name in _RANK if _given(name)]
    alone = os.environ.get("WORLD_SIZE") == "1" and all(os.environ.get(name, "0") == "0" for name in _RANK[::2])
    if not given or alone:
        return ALONE
    return _numbered("environment", "NODE_RANK", ())


def first_host(nodelist: str) -> str:
    """The first host of what SLURM writes for several: node01 of `node[01-04,7],other`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else ""


def _numbered(
    launcher: Literal["launch", "torchrun", "environment"],
    node: str,
    marks: tuple[str, ...],
    store_fd: int | None = None,
) -> Place:
    """From the variables that torch's launchers agreed on; what is wrong with them is told with all their values."""
    names = (*marks, *_RANK, "LOCAL_WORLD_SIZE", node, *_STORE)
    if missing := [name for name in (*_RANK, *_STORE) if not _given(name)]:
        raise _refused(names, f"without {' and '.join(missing)}")
    rank, world_size, local_rank = _numbers(_RANK, names)
    port = _port(names)
    if not _given("LOCAL_WORLD_SIZE") and rank != local_rank:  # several nodes, then
        raise _refused(names, "without LOCAL_WORLD_SIZE, the number of ranks on this node")
    local_world_size = _numbers(("LOCAL_WORLD_SIZE",), names)[0] if _given("LOCAL_WORLD_SIZE") else world_size
    node_rank = _numbers((node,), names)[0] if _given(node) else (rank - local_rank) // max(local_world_size, 1)
    if rank >= world_size:
        raise _refused(names, "RANK must be below WORLD_SIZE")
    if local_rank >= local_world_size:
        raise _refused(names, "LOCAL_RANK must be below LOCAL_WORLD_SIZE")
    if local_world_size > world_size:
        raise _refused(names, "LOCAL_WORLD_SIZE must be at most WORLD_SIZE")
    address = os.environ["MASTER_ADDR"]
    return Place(rank, local_rank, world_size, local_world_size, node_rank, address, port, launcher, store_fd)


def _n_tasks() -> int:
    """How many tasks the job step has that this process belongs to; 0 outside a step that srun started."""
    step = os.environ.get("SLURM_STEP_ID", "")
    if not step.isdecimal() or int(step) >= _FIRST_SPECIAL_STEP:
        return 0
    n_tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "")
    return int(n_tasks) if n_tasks.isdecimal() else 0


def _task_of_step() -> Place:
    """The port, unless MASTER_PORT is set, is 20000 + (job + 1013 * step) % 10000: apart for neighbouring jobs and
    for the steps of one job."""
    names = (*_STEP, *_LAYOUT)
    if missing := [name for name in names if not _given(name)]:
        raise _refused(names, f"a task of srun without {' and '.join(missing)}")
    job, step, rank, local_rank, node_rank = _numbers(_STEP, names)
    nodes = _per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
    if not (node_rank < len(nodes) and local_rank < nodes[node_rank] and rank < sum(nodes) == _n_tasks()):
        raise _refused((*names, "SLURM_STEP_NUM_TASKS"), "they contradict each other")
    address = os.environ.get("MASTER_ADDR") or first_host(os.environ["SLURM_STEP_NODELIST"])
    by_job = _PORTS[(job + 1013 * step) % len(_PORTS)]
    port = _port((*names, "MASTER_PORT")) if _given("MASTER_PORT") else by_job
    return Place(rank, local_rank, sum(nodes), nodes[node_rank], node_rank, address, port, "srun")


def _per_node(text: str) -> list[int]:
    """The numbers that `2(x3),1` stands for."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(n_tasks) for n_tasks, times in found for _ in range(int(times or 1))]


def _given(name: str) -> bool:
    return bool(os.environ.get(name))


def _numbers(names: tuple[str, ...], all_names: tuple[str, ...]) -> list[int]:
    for name in names:
        if not os.environ[name].isdecimal():
            raise _refused(all_names, f"{name} must be a whole number")
    return [int(os.environ[name]) for name in names]


def _port(names: tuple[str, ...]) -> int:
    (port,) = _numbers(("MASTER_PORT",), names)
    if not 0 < port < 2**16:
        raise _refused(names, "MASTER_PORT must lie between 1 and 65535")
    return port


def _refused(names: tuple[str, ...], rule: str) -> ConfigError:
    values = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    wanted = (
        "" if names[0].startswith("SLURM") else f", or set all of {' '.join((*_RANK, 'LOCAL_WORLD_SIZE', *_STORE))}"
    )
    remedy = f"stale from another program, or incomplete: {_unset(names)}{wanted}"
    return ConfigError([line(values, "", rule, remedy)])


def _unset(names: tuple[str, ...]) -> str:
    return f"unset {' '.join(name for name in names if name in os.environ)}"
