"""What each strategy holds in memory, per process: `python benchmarks/strategies.py`; some minutes on two cores.

Trains the same model for three steps under each strategy, started as a user starts it, and writes
benchmarks/results/strategies.json and a table in MiB. Bytes held are added up over the tensors of a rank; the peak is
by how much the process grew, as the kernel counts it, from before the network was built to the end of the last step.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "strategies.json"
MODEL = ["model.dim=512", "model.n_layers=8", "model.n_heads=8", "model.ffn_dim=2048", "model.tie_embeddings=false"]
RUN = [
    "tokenizer=bytes",
    "data.max_length=128",
    "data.batch_size=16",
    "data.micro_batch_size=4",
    "optimizer=adamw",
    "schedule=constant",
    "schedule.warmup_steps=0",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.max_steps=3",
    "trainer.limit_val_batches=0",
    "callback=none",
    "logger=none",
]
FSDP = ["strategy=fsdp", "trainer.devices=4"]
SETTINGS = {
    "single": ["strategy=single"],
    "ddp x4": ["strategy=ddp", "trainer.devices=4"],
    "fsdp x4": FSDP,
    "fsdp x4, reshard_after_forward=false": [*FSDP, "strategy.reshard_after_forward=false"],
    "hsdp 2x2": [*FSDP, "strategy.replicate_size=2"],
    "fsdp+tp 2x2": [*FSDP, "strategy.tensor_parallel_size=2"],
    "fsdp x4, checkpointing=selective": [*FSDP, "strategy.checkpointing=selective"],
    "fsdp x4, checkpointing=full": [*FSDP, "strategy.checkpointing=full"],
    "fsdp x4, 4 micro-batches": [*FSDP, "data.micro_batch_size=1"],
}


class Memory(Callback):
    """Writes down what this rank holds at the end of the last step."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before the network is built: forget the peak of the imports."""
        Path("/proc/self/clear_refs").write_text("5")
        self.start = resident("VmRSS")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parameters = list(pl_module.parameters())
        state = [value for values in trainer.optimizers[0].state.values() for value in values.values()]
        measured = {
            "n_parameters": sum(parameter.numel() for parameter in parameters),
            "parameters": held(parameters),
            "optimizer": held([value for value in state if isinstance(value, Tensor)]),
            "peak": resident("VmHWM") - self.start,
        }
        (Path(self.folder) / f"rank{trainer.global_rank}.json").write_text(json.dumps(measured))


def held(tensors: list[Any]) -> int:
    """Bytes of this rank's part."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def resident(name: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(overrides: list[str], folder: Path) -> dict[str, int]:
    """The largest of the ranks' numbers."""
    memory = f"+callback.memory={{_target_: benchmarks.strategies.Memory, folder: {folder}}}"
    command = [sys.executable, str(ROOT / "train.py"), *MODEL, *RUN, f"run_dir={folder / 'run'}", *overrides]
    # Freed at once, as a device would count it, and not kept for the next allocation.
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    subprocess.run([*command, memory, "packages=[benchmarks]"], env=environment, check=True, stdout=subprocess.DEVNULL)
    ranks = [json.loads(path.read_text()) for path in folder.glob("rank*.json")]
    return {name: max(rank[name] for rank in ranks) for name in ranks[0]}


def main() -> None:
    """Measure, write, print."""
    rows: dict[str, dict[str, int]] = {}
    for name, overrides in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = measure(overrides, Path(folder))
        row = rows[name]
        print(
            f"{name:<40}" + "".join(f"{row[key] / 2**20:10.1f}" for key in ("parameters", "optimizer", "peak")),
            flush=True,
        )
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, gloo",
        "versions": {name: metadata.version(name) for name in ("torch", "lightning")},
        "commit": commit.stdout.strip(),
        "settings": [*MODEL, *RUN],
        "unit": "bytes, largest of the ranks",
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
