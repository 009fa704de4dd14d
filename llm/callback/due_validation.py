"""No step that should be validated goes unmeasured."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from llm.callback.record import Record


class DueValidation(Callback):
    """Validate after the last step of a run, and where an interruption came between a step and its validation."""

    def __init__(self) -> None:
        self._validated_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The checkpoint of a step is taken before its validation; after a restart that one is still due."""
        interval, step = trainer.val_check_batch, trainer.global_step
        due = step == trainer.max_steps or (interval and step % interval == 0)
        if due and self._validated_step != step:
            if trainer.is_global_zero:
                Record.of(trainer).forget_validation(step)
            _validate(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember where the last validation was."""
        self._validated_step = trainer.global_step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """To Lightning a whole run is one epoch, so this is its end."""
        if self._validated_step != trainer.global_step:
            _validate(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Whether the step of the checkpoint has been validated."""
        return {"validated_step": self._validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The other half of `state_dict`."""
        self._validated_step = state_dict["validated_step"]


def _validate(trainer: L.Trainer) -> None:
    """Enter the validation loop as Lightning's training loop does between two batches."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
