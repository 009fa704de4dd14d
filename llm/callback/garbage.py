"""Python's garbage collector, by the step."""

from __future__ import annotations

import gc
from typing import Annotated, Any

import lightning as L
from annotated_types import Gt
from lightning.pytorch.callbacks import Callback


class Garbage(Callback):
    """Collect after the same steps on all processes, instead of whenever one of them has made enough objects: then all
    would wait for one, at another step each time.

    What was there before training is never looked through again, which is most of what a full collection costs.

    Args:
        every_n_steps: between two collections of young objects. Tensors go at once, by their reference count: only
            cycles wait.
    """

    def __init__(self, every_n_steps: Annotated[int, Gt(0)] = 100) -> None:
        self.every_n_steps = every_n_steps
        self._ours = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The collector works for us from here on, unless somebody else has turned it off."""
        self._ours = gc.isenabled()
        if self._ours:
            gc.collect()
            gc.freeze()
            gc.disable()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Young objects only."""
        if self._ours and trainer.global_step % self.every_n_steps == 0:
            gc.collect(1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Everything, where all processes have stopped anyway."""
        if self._ours:
            gc.collect()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give it back."""
        self._give_back()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give it back."""
        self._give_back()

    def _give_back(self) -> None:
        if self._ours:
            self._ours = False
            gc.unfreeze()
            gc.enable()
