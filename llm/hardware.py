"""GPUs by the names that clusters and torch have for them: what their data sheets say."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One device.

    Attributes:
        name: as people say it.
        memory_bytes: which CUDA says it has, about.
        peak_flops: dense, in bfloat16.
        memory_bytes_per_s: to its own memory.
        watts: it may take; nodes, network and cooling come on top.
    """

    name: str
    memory_bytes: float
    peak_flops: float
    memory_bytes_per_s: float
    watts: float


_GIB = 2.0**30
# Longest name first where one contains another. Memory as torch.cuda.mem_get_info gives it, a little below the label.
GPUS = (
    Gpu("GB200", 184 * _GIB, 2500e12, 8.0e12, 1200),
    Gpu("B200", 178 * _GIB, 2250e12, 8.0e12, 1000),
    Gpu("GH200", 94 * _GIB, 989e12, 4.0e12, 900),
    Gpu("H200", 139.8 * _GIB, 989e12, 4.8e12, 700),
    Gpu("H100 PCIe", 79.1 * _GIB, 756e12, 2.0e12, 350),
    Gpu("H100 NVL", 93.1 * _GIB, 835e12, 3.9e12, 400),
    Gpu("H100", 79.1 * _GIB, 989e12, 3.35e12, 700),
    Gpu("A100 40GB", 39.4 * _GIB, 312e12, 1.555e12, 400),
    Gpu("A100", 79.1 * _GIB, 312e12, 2.0e12, 400),
    Gpu("L40S", 44.4 * _GIB, 362e12, 0.864e12, 350),
    Gpu("A40", 44.4 * _GIB, 149.7e12, 0.696e12, 300),
    Gpu("A10", 22.1 * _GIB, 125e12, 0.6e12, 150),
    Gpu("L4", 22.0 * _GIB, 121e12, 0.3e12, 72),
    Gpu("V100", 31.7 * _GIB, 125e12, 0.9e12, 300),
    Gpu("RTX 4090", 23.6 * _GIB, 165.2e12, 1.008e12, 450),
    Gpu("RTX 3090", 23.6 * _GIB, 71e12, 0.936e12, 350),
)


def gpu_named(name: str) -> Gpu | None:
    """The one that a cluster calls `h100`, `nvidia_a100-sxm4-80gb` or the like; None if it is not among `GPUS`."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((gpu for gpu in GPUS if set(gpu.name.lower().split()) <= set(words)), None)
