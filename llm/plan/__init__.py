"""What a run will cost, before there is one: from bytes on the wire, seconds of a step and a step on fake tensors."""

from llm.plan.scaling import (
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
from llm.plan.traffic import Layout, Model, Stage, Transfer, bytes_by_kind, stages

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
    "stages",
    "step_time",
    "tokens_per_s",
    "update_s",
]
