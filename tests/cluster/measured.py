"""The memory that a step takes of the allocator, of a run that is really made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from llm.reduce import own_part
from tests.runs import run_composed


class MeasurePeak(Callback):
    """Writes down the most bytes that step number `step` had at any time: those of what lives through all steps, and
    what the allocator gave and took back in between, kernels' own room included."""

    def __init__(self, folder: str, step: int = 1) -> None:
        self.folder, self.step = Path(folder), step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.step:
            state = [list(trainer.optimizers[0].state.values()), list(pl_module.parameters())]
            state += [[p.grad for p in pl_module.parameters() if p.grad is not None], batch.micro_batches]
            storages = {}
            for tensor in tree_leaves(state):
                if isinstance(tensor, Tensor):
                    storage = own_part(tensor).untyped_storage()
                    storages[storage._cdata] = storage.nbytes()
            self.before = sum(storages.values())
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.step:
            self.profile.__exit__(None, None, None)
            now = peak = self.before
            events = self.profile.profiler.kineto_results.events()  # type: ignore[union-attr]
            for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
                now += event.nbytes()
                peak = max(peak, now)
            path = self.folder / f"peak-{trainer.global_rank}.json"
            path.write_text(json.dumps({"before": self.before, "peak": peak}))


def measured_peak(overrides: list[str], folder: str) -> int:
    """Of the tiny run with `overrides`, on this process: bytes at the worst of its second step, the first that
    finds an optimizer's state."""
    node = f"+callback.measured={{_target_: tests.cluster.measured.MeasurePeak, folder: {folder}}}"
    steps = ["trainer.max_steps=2", "schedule.warmup_steps=0", "trainer.val_check_interval=100"]
    run_composed([*overrides, *steps, "packages=[tests]", node])
    rank = os.environ.get("RANK", "0")
    found: int = json.loads((Path(folder) / f"peak-{rank}.json").read_text())["peak"]
    return found
