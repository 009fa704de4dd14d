"""How fast the device copies and multiplies, as JSON: `python -m benchmarks.contestants.ceilings DEVICE SIZE`."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object], device: torch.device, n: int) -> float:
    """Of one `work`, the shortest of five times n of them."""
    times = []
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        for _ in range(n):
            work()
        _wait(device)
        times.append((time.perf_counter() - start) / n)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(device: torch.device, size: int) -> None:
    """Random data: a device multiplies zeros at a lower power, and faster."""
    n_bytes = 16 * size * size
    source = torch.randint(0, 255, (n_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = seconds(functools.partial(target.copy_, source), device, 10)
    del source, target
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    matmul_s = seconds(functools.partial(torch.mm, left, right, out=out), device, 20)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    figures = {
        "device": name,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0,
        "copy_bytes_per_s": 2 * n_bytes / copy_s,
        "matmul_flop_per_s": 2 * size**3 / matmul_s,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(torch.device(sys.argv[1]), int(sys.argv[2]))
