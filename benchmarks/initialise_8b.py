"""What one of 64 ranks of Llama 3 8B holds while its weights are drawn, and how long that takes.

    python benchmarks/initialise_8b.py

Builds conf/model/llama_8b on the meta device, spreads it as strategy=fsdp does, over a process group of 64 of which
there is only this process (initialising sends nothing), and draws the first rank's part in float32 on the CPU, in one
thread. Writes benchmarks/results/initialise_8b.json.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
import yaml
from torch.distributed.device_mesh import init_device_mesh

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from llm.model import Transformer  # noqa: E402
from llm.model.config import config_from  # noqa: E402
from llm.strategy import FSDP  # noqa: E402
from llm.strategy.apply import apply  # noqa: E402
from llm.strategy.materialise import materialise  # noqa: E402
from llm.strategy.process_group import fake_ranks  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "initialise_8b.json"
N_RANKS = 64


def peak() -> int:
    """Bytes of this process in memory, at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure() -> dict[str, float | int | str]:
    """Build, spread, draw."""
    strategy = FSDP()
    with fake_ranks(N_RANKS):
        strategy._device_mesh = init_device_mesh(
            "cpu", (1, N_RANKS, 1), mesh_dim_names=("replicate", "shard", "tensor")
        )
        with strategy.model_sharded_context():
            network = Transformer(config_from(yaml.safe_load((ROOT / "conf/model/llama_8b.yaml").read_text())))
        sizes = {
            name: sum(parameter.numel() * 4 for parameter in module.parameters(recurse=False))
            for name, module in network.named_modules()
        }
        apply(network, shard=partial(strategy._shard, mesh=strategy._data_mesh()))
        before, wall, cpu = peak(), time.perf_counter(), time.process_time()
        materialise(network, torch.device("cpu"))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        after = peak()
        part = sum(parameter.to_local().numel() * 4 for parameter in network.parameters())  # type: ignore[attr-defined]
    largest = max(sizes, key=sizes.__getitem__)
    return {
        "ranks": N_RANKS,
        "parameters": network.n_parameters(),
        "whole_bytes": network.n_parameters() * 4,
        "part_bytes": part,
        "largest_module": largest,
        "largest_module_bytes": sizes[largest],
        "rss_before_bytes": before,
        "peak_rss_bytes": after,
        "grown_bytes": after - before,
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
    }


def main() -> None:
    """Measure, write, print."""
    row = measure()
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "versions": {"torch": metadata.version("torch")},
        "commit": subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip(),
    }
    RESULTS.write_text(json.dumps({**about, **row}, indent=1) + "\n")
    for name, value in row.items():
        print(f"{name:<22} {value / 2**20:,.0f} MiB" if name.endswith("_bytes") else f"{name:<22} {value}")  # type: ignore[operator]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
