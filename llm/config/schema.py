"""The root of a run's configuration, and the id that names the run."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt, MinLen
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import MISSING, OmegaConf

from llm.config.online import wandb_offline

RUN_ID = "LLM_RUN_ID"


@dataclass
class Run:
    """Everything a run consists of. A key that is not here fails where it is written: in a file or on the command line.

    The scalars are `Any` so that OmegaConf neither converts nor refuses them: `SCALARS` says what they may be, and the
    check reports them together with every other mistake.
    """

    model: dict[str, Any] = MISSING
    tokenizer: dict[str, Any] = MISSING
    data: dict[str, Any] = MISSING
    objective: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    schedule: dict[str, Any] = MISSING
    guard: dict[str, Any] = MISSING
    strategy: dict[str, Any] = MISSING
    callback: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = MISSING
    seed: Any = 0
    stage: Any = "fit"
    run_name: Any = "${run_id:}"
    run_dir: Any = "runs/${run_name}"
    resume: Any = "auto"
    init_from: Any = None
    adapter: Any = None
    cluster: Any = None
    packages: Any = field(default_factory=list)


ROOT = tuple(item.name for item in fields(Run))
NODES = ("model", "tokenizer", "data", "objective", "optimizer", "schedule", "guard", "strategy", "trainer")
NODE_DICTS = ("callback", "logger")
SCALARS: dict[str, Any] = {
    "seed": Annotated[int, Ge(0), Lt(2**32)],  # NumPy takes no more than 32 bits
    "stage": Literal["fit", "validate"],
    "run_name": Annotated[str, MinLen(1)],
    "run_dir": Annotated[str, MinLen(1)],
    "resume": Annotated[str, MinLen(1)],
    "init_from": str | None,
    "packages": list[str],
}


def register() -> None:
    """Make the schema known to Hydra as `run`, and `${run_id:}` and `${run_group:…}` to OmegaConf. Calling it again
    changes nothing."""
    ConfigStore.instance().store(name="run", node=Run)
    OmegaConf.register_new_resolver("run_id", job_run_id, replace=True)
    OmegaConf.register_new_resolver("run_group", run_group, replace=True)
    OmegaConf.register_new_resolver("wandb_offline", wandb_offline, use_cache=True, replace=True)


def run_id() -> str:
    """The id of this run: what names it from outside, else the time and four random hex.

    A made id is put into the environment, so that processes started from here belong to the same run.
    """
    given = given_run_id()
    if given:
        return given
    os.environ[RUN_ID] = made_run_id()
    return os.environ[RUN_ID]


def made_run_id() -> str:
    """A new one: the time and four random hex."""
    return f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(2)}"


def given_run_id() -> str | None:
    """What names this run from outside, the same in all its processes: LLM_RUN_ID, else the SLURM job or array task."""
    if given := os.environ.get(RUN_ID):
        return given
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def run_group(run_name: str) -> str | None:
    """`${run_group:…}`: what runs are below, as lr of lr/0 and lr/1; null of a run by itself."""
    return str(run_name).rpartition("/")[0] or None


def job_run_id() -> str:
    """`${run_id:}`: the run id, and in a sweep whose jobs Hydra runs in one process the job's number below it."""
    if not HydraConfig.initialized():
        return run_id()
    config = HydraConfig.get()
    if config.mode != RunMode.MULTIRUN or OmegaConf.is_missing(config.job, "num"):
        return run_id()
    return f"{run_id()}/{config.job.num}"
