"""A callback that counts what makes the host wait for the device."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode


class Counting(TorchDispatchMode):
    """How often aten::_local_scalar_dense was called."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class CountSyncs(Callback):
    """Writes `syncs.json`: step -> how often since the step before; all that the loop and the callbacks do is in it."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.counts: Counter[int] = Counter()
        self.mode = Counting()
        self.mode.__enter__()
        torch.ones(()).item()
        assert self.mode.n == 1, "the count of a sync that was made for it"
        self.mode.n = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.counts[trainer.global_step], self.mode.n = self.mode.n, 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.mode.__exit__(None, None, None)
        Path("syncs.json").write_text(json.dumps(self.counts))
