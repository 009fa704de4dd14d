"""What a plan is made for: a run, built but not begun, and the machines that it is to have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from omegaconf import DictConfig

from llm.agree import agree
from llm.build import built
from llm.checkpoint import starting_anew
from llm.cluster.slurm import Slurm, cluster_of
from llm.config import ConfigError
from llm.config.mistake import line
from llm.data import DataError, TextData
from llm.data.cache import MissingError, only_found
from llm.hardware import GPUS, Gpu, gpu_named
from llm.machine import precision
from llm.model import Transformer, TransformerConfig
from llm.objective import Objective
from llm.plan.rows import Rows, rows_of
from llm.plan.trace import Moments, Played, on_meta, trace
from llm.plan.traffic import Layout, Model
from llm.run import settled
from llm.strategy import DDP, FSDP, Single

_UNITS = {"": 2**20, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}  # of sbatch's --mem


@dataclass(frozen=True)
class Stated:
    """What no configuration says, and the user may.

    Attributes:
        gpu: by name; None: what cluster.gpu_type says, or the GPU of this machine.
        network: between nodes.
        mfu: share of the GPU's peak that one alone reaches; None: as recorded of the same GPU, else assumed.
        tokens_per_s: of one device alone, instead of `mfu`.
        disk_bytes_per_s: at which checkpoints are written, all processes together.
    """

    gpu: str | None = None
    network: str = "infiniband"
    mfu: float | None = None
    tokens_per_s: float | None = None
    disk_bytes_per_s: float = 1e9


@dataclass(frozen=True)
class Subject:
    """A run and its machines.

    Attributes:
        cfg: settled: with the vocabulary, the accelerator and the precision that the run will have.
        gpu: None on a CPU, and where nobody says which GPU.
        on_gpu: whether on one.
        world_size: processes.
        n_steps: of the whole run, if that is known.
    """

    cfg: DictConfig
    data: TextData
    strategy: Single | DDP | FSDP
    objective: Objective
    cluster: Slurm | None
    gpu: Gpu | None
    on_gpu: bool
    world_size: int
    n_steps: int | None

    @property
    def model(self) -> TransformerConfig:
        return self.objective.model_config

    @cached_property
    def network(self) -> Transformer:
        """On the meta device."""
        return on_meta(self.model, self.objective)

    @property
    def n_data(self) -> int:
        """Processes with data of their own."""
        return self.strategy.n_data_processes(self.world_size)

    @cached_property
    def rows(self) -> Rows:
        """Of a micro-batch."""
        return rows_of(self.data, self.n_data)

    @property
    def n_micro_batches(self) -> int:
        """Of a step, on each process."""
        return self.data.batch_size // self.n_data // self.rows.n

    @property
    def precision(self) -> str:
        return str(self.cfg.trainer.precision)

    @cached_property
    def moments(self) -> Moments:
        """What a process needs of memory, moment by moment."""
        played = Played(self.world_size, self.precision, self.on_gpu, self.rows, self.n_micro_batches)
        return trace(self.objective, self.strategy, self.data, played)

    @cached_property
    def layout(self) -> Layout:
        """For the bytes on the wire, and the time."""
        fsdp = self.strategy if isinstance(self.strategy, FSDP) else None
        name = "fsdp" if fsdp else "ddp" if isinstance(self.strategy, DDP) else "single"
        both = self.model.family == "encoder_decoder"
        halves = self.precision == "bf16-true" and fsdp is not None
        return Layout(
            name,  # type: ignore[arg-type]
            self.world_size,
            fsdp.replicate_size if fsdp else 1,
            fsdp.tensor_parallel_size if fsdp else 1,
            fsdp.reshard_after_forward if fsdp else True,
            self.n_micro_batches,
            micro_batch_tokens=self.rows.n * (self.rows.target if both else self.rows.length),
            weight_bytes=2 if halves else 4,
            source_tokens=self.rows.n * self.rows.length if both else 0,
            scored_tokens=self.rows.scored,
            mixed=self.precision.endswith("-mixed"),
        )

    @cached_property
    def shapes(self) -> Model:
        """For the bytes on the wire, and the time."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.network.named_parameters()}
        return Model(shapes, self.flops_per_token)

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, by the convention of MFU."""
        rows = self.rows
        return self.network.flops_per_token(rows.length, rows.target, rows.scored / rows.tokens)

    @property
    def memory_bytes(self) -> float | None:
        """That a process may have; None where nobody says."""
        if self.on_gpu:
            return None if self.gpu is None else self.gpu.memory_bytes
        if self.cluster is None or self.cluster.memory in (None, "0", 0):
            return None
        found = re.fullmatch(r"(\d+)([KMGT]?)B?", str(self.cluster.memory).upper())
        return None if found is None else int(found[1]) * _UNITS[found[2]] / self.cluster.ranks_per_node


def subject(cfg: DictConfig, stated: Stated) -> Subject:
    """Build what `cfg` describes, for the machines that it will have.

    Raises:
        ConfigError: with every rule between its groups that does not hold.
    """
    cfg = cfg.copy()
    cluster = None if cfg.cluster is None else cluster_of(cfg)
    if cluster is not None:
        cfg.trainer.num_nodes, cfg.trainer.devices = cluster.nodes, cluster.ranks_per_node
    on_gpu = _on_gpu(cfg, cluster, stated)
    mistakes = [] if cluster is None else _accelerator(cfg, cluster)
    cfg.trainer.accelerator = "cuda" if on_gpu else "cpu"
    cfg.trainer.precision = precision(cfg.trainer.precision, cfg.trainer.accelerator)
    try:
        data, objective = settled(cfg)
        strategy = built(cfg.strategy)
        agree(cfg, built(cfg.model), data, strategy, None, objective)
    except ConfigError as error:
        raise ConfigError([*mistakes, *error.mistakes]) from error
    if mistakes:
        raise ConfigError(mistakes)
    n_steps = steps(cfg, data)
    cfg.trainer.max_steps = n_steps or 1 + int(cfg.schedule.get("warmup_steps", 0))  # a schedule wants to know an end
    devices = cfg.trainer.devices
    world_size = cfg.trainer.num_nodes * (devices if isinstance(devices, int) and devices > 0 else 1)
    gpu = _gpu(cluster, stated) if on_gpu else None
    trained: Objective = built(cfg.objective)
    if trained.adapter is not None:
        trained.anew = starting_anew(trained.model_config, cfg.init_from)
    return Subject(cfg, data, strategy, trained, cluster, gpu, on_gpu, world_size, n_steps)


def steps(cfg: DictConfig, data: TextData) -> int | None:
    """Optimizer steps of the whole run; None where that takes data that has not been prepared.

    Of tokens, before it is, about: as if rows were full.
    """
    length: dict[str, Any] = {"max_tokens": cfg.trainer.max_tokens, "max_epochs": cfg.trainer.max_epochs}
    if cfg.trainer.max_steps is not None:
        return int(cfg.trainer.max_steps)
    if unprepared(data) is None:
        return data.n_steps(**length)
    if cfg.trainer.max_tokens is None:
        return None
    return max(1, round(cfg.trainer.max_tokens / (data.batch_size * data.max_length)))


def unprepared(data: TextData) -> str | None:
    """Why not all is there that preparing it would make; None: it is. Without network or files it cannot even be named,
    which says nothing of the machines that the run will have."""
    try:
        with only_found():
            data.prepare()
    except MissingError:
        return "not prepared yet (python -m llm prepare …)"
    except (DataError, OSError) as error:
        return f"cannot be prepared on this machine ({str(error).splitlines()[0]})"
    return None


def _on_gpu(cfg: DictConfig, cluster: Slurm | None, stated: Stated) -> bool:
    if cluster is not None:
        return cluster.gpus_per_node is not None
    if cfg.trainer.accelerator == "auto":
        return stated.gpu is not None or torch.cuda.is_available()
    return bool(cfg.trainer.accelerator != "cpu")


def _accelerator(cfg: DictConfig, cluster: Slurm) -> list[str]:
    """Whether the run is to compute on what the job has."""
    asked, there = str(cfg.trainer.accelerator), cluster.gpus_per_node
    if asked == "auto" or (asked == "cpu") == (there is None):
        return []
    has = "no GPUs" if there is None else f"{there} GPUs on each node"
    return [line("trainer.accelerator", asked, f"the job has {has}", "auto takes what there is")]


def _gpu(cluster: Slurm | None, stated: Stated) -> Gpu | None:
    """
    Raises:
        ConfigError: for a name that no data sheet is known of.
    """
    name = stated.gpu or (None if cluster is None else cluster.gpu_type)
    if name is None and cluster is None and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    if name is None:
        return None
    found = gpu_named(name)
    if found is None and stated.gpu is not None:
        known = ", ".join(gpu.name for gpu in GPUS)
        raise ConfigError([line("--gpu", name, "no data sheet of it is known", f"one of {known}")])
    return found
