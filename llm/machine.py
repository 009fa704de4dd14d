"""What this machine is, and what it computes fast."""

from __future__ import annotations

import ctypes
import sys

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether it has instructions for products of bfloat16 matrices: every GPU that is served here, and of the CPUs
    those with AVX-512 BF16, AMX or their like."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one. It gives the end of its heap back to the system, which is
    asked for it again, page by page, cleared: 4,600 page faults a step of a 2.6M model, 3 % of its time. Other C
    libraries are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and sys.platform == "linux":
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # the most that it takes


def accelerator(wanted: str) -> str:
    """What auto means: a GPU where torch drives one, else the CPU."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def precision(wanted: str, accelerator: str) -> str:
    """What auto means. A CPU without instructions for bfloat16, as most have none, takes it for its parts: a product of
    two matrices took a hundred times as long as in float32 on one with AVX2."""
    if wanted != "auto":
        return wanted
    return "32-true" if accelerator == "cpu" and not multiplies_bfloat16(torch.device("cpu")) else "bf16-mixed"
