"""A run on a cluster: what it will take (`plan`, from bytes on the wire, seconds of a step and a step on fake tensors),
and how it gets there (`commands`: submit, status, logs, cancel)."""

from llm.cluster.scaling import (
    H100_ETHERNET,
    H100_INFINIBAND,
    INTERFERENCE,
    Cluster,
    Link,
    StepTime,
    step_time,
    tokens_per_s,
    update_s,
)
from llm.cluster.slurm import Slurm
from llm.cluster.traffic import Layout, Model, Stage, Transfer, bytes_by_kind, stages

__all__ = [
    "H100_ETHERNET",
    "H100_INFINIBAND",
    "INTERFERENCE",
    "Cluster",
    "Layout",
    "Link",
    "Model",
    "Slurm",
    "Stage",
    "StepTime",
    "Transfer",
    "bytes_by_kind",
    "stages",
    "step_time",
    "tokens_per_s",
    "update_s",
]
