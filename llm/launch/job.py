"""How many ranks a configuration asks for, and the command line that makes one of them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from llm.config.command_line import split_flags
from llm.config.mistake import ConfigError, line
from llm.launch.place import Place

# What makes a sweep of a command line: a job of it is no sweep.
_SWEEP = re.compile(r"\+*hydra[./](mode|sweep|sweeper|launcher)\b")


def ranks_to_start(cfg: DictConfig, here: Place) -> int:
    """How many ranks this process has to start on its node; 0 if it runs `cfg` itself.

    Raises:
        ConfigError: for a sweep among ranks, each of which would go through all of its jobs in one process.
    """
    if here.world_size > 1 and _is_sweep():
        rule = f"one of the {here.world_size} processes of {here.launcher} cannot be many runs, one after the other"
        raise ConfigError([line("-m", "", rule, "python train.py -m … starts processes for each; or start each run")])
    if here.launcher != "none":
        return 0
    _without_srun(cfg)
    if str(cfg.strategy._target_).endswith(".Single"):
        return 0
    n_devices = _n_devices(cfg)
    return 0 if (n_devices, cfg.trainer.get("num_nodes", 1)) == (1, 1) else n_devices


def job_command() -> list[str]:
    """What starts this program once more, for the job that Hydra runs now, with the interpreter's flags as given."""
    return [*program(), *job_arguments(sys.argv[1:])]


def program() -> list[str]:
    """What starts this program once more, without its arguments."""
    n_arguments = len(sys.argv) - 1
    return [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - n_arguments]]


def job_arguments(argv: Sequence[str]) -> list[str]:
    """The command line (`sys.argv[1:]`) of one run: as given, or in a sweep that of the job that Hydra runs now."""
    if not _is_sweep():
        return list(argv)
    job = HydraConfig.get()
    return arguments_of_job(argv, job.overrides.hydra, job.job.num, job.overrides.task)


def arguments_of_job(argv: Sequence[str], hydra: Sequence[str], number: int, overrides: Sequence[str]) -> list[str]:
    """The command line of one job of a sweep.

    Args:
        argv: of the sweep.
        hydra: its overrides of Hydra's own keys.
        number: of the job, which a run_dir of the user's may name.
        overrides: of the job.
    """
    return [
        *split_flags(argv)[0],
        *(override for override in hydra if not _SWEEP.match(override)),
        f"hydra.job.num={number}",
        *overrides,
    ]


def _without_srun(cfg: DictConfig) -> None:
    """In a job of several nodes a process that srun did not start is alone on one of them.

    Raises:
        ConfigError: unless it says which node it is.
    """
    n_nodes = os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_JOB_NUM_NODES", "1")
    if n_nodes not in ("", "1") and cfg.stage == "fit" and not os.environ.get("NODE_RANK"):
        rule = (
            f"train.py was started on one of the {n_nodes} nodes of job {os.environ.get('SLURM_JOB_ID')}, not by srun"
        )
        remedy = "srun python train.py …, or sbatch slurm/train.sbatch …; for one node only unset SLURM_JOB_NUM_NODES"
        raise ConfigError([line("srun", "", rule, remedy)])


def _is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _n_devices(cfg: DictConfig) -> int:
    """What trainer.devices comes to on this node."""
    devices, accelerator = cfg.trainer.get("devices", "auto"), cfg.trainer.get("accelerator", "auto")
    if devices not in ("auto", -1):
        return devices if isinstance(devices, int) else len(devices)
    if accelerator == "cpu":
        return 1
    import torch  # which alone knows how many there are

    return max(1, torch.cuda.device_count())
