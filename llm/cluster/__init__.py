"""What a cluster makes of a run before it is started: bytes on the wire, seconds per step, memory. Arithmetic only."""

from llm.cluster.memory import memory_bytes
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
from llm.cluster.traffic import Layout, Model, Stage, Transfer, bytes_by_kind, stages

__all__ = [
    "H100_ETHERNET",
    "H100_INFINIBAND",
    "INTERFERENCE",
    "Cluster",
    "Layout",
    "Link",
    "Model",
    "Stage",
    "StepTime",
    "Transfer",
    "bytes_by_kind",
    "memory_bytes",
    "stages",
    "step_time",
    "tokens_per_s",
    "update_s",
]
