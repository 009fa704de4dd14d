"""Faults on purpose, for `python -m llm verify`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
from annotated_types import Gt
from lightning.pytorch.callbacks import Callback

from llm.checkpoint import manifest

LOADED = "loaded"


class Rehearsal(Callback):
    """Interrupt a run where nobody could wish it, or write down what it has loaded.

    Args:
        fault: SIGUSR1, to all processes; SIGTERM, to the last one; SIGKILL, of the first one when all
            files of a checkpoint are written and it has not got its name yet; none saves what was loaded to
            `RUN/loaded`, before the first step.
        step: during which the signals come, or after which the checkpoint is due.
    """

    def __init__(
        self, fault: Literal["SIGUSR1", "SIGTERM", "SIGKILL", "none"], step: Annotated[int, Gt(0)] = 1
    ) -> None:
        self.fault = fault
        self.step = step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What lies in memory goes through the same writer as a checkpoint."""
        if self.fault == "none":
            trainer.save_checkpoint(Path(trainer.default_root_dir) / LOADED)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Told in the middle of a step."""
        last = trainer.global_rank == trainer.world_size - 1
        if trainer.global_step == self.step - 1 and (self.fault == "SIGUSR1" or (self.fault == "SIGTERM" and last)):
            os.kill(os.getpid(), signal.Signals[self.fault])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The manifest is the last file, and the first process writes it."""
        if self.fault == "SIGKILL" and trainer.global_step == self.step and trainer.is_global_zero:
            manifest.write = _die  # type: ignore[assignment]


def _die(*arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
