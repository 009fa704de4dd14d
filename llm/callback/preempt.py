"""A run that is told to go saves first."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from llm import signals
from llm.callback.checkpoint import save_step
from llm.reduce import AnyRaised, gather_objects


class Preempt(Callback):
    """SIGTERM, SIGUSR1, SIGUSR2, SIGHUP (a closed terminal) or Ctrl-C: finish the step, save, leave; a second Ctrl-C
    leaves.

    One process that was told is enough: all of them learn it, and stop after the same step. Who was told while the
    network was built saves after the first.
    """

    def __init__(self) -> None:
        self._any_told = AnyRaised()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nobody has been asked."""
        self._any_told = AnyRaised()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and leave, between two steps, where a run can be continued exactly."""
        self._leave_if_told(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Validation lies between two steps too, and may be long; it is made up for when the run continues."""
        self._leave_if_told(trainer)

    def _leave_if_told(self, trainer: L.Trainer) -> None:
        if self._any_told(signals.received() is not None):
            self._leave(trainer)

    def _leave(self, trainer: L.Trainer) -> None:
        path = save_step(trainer)
        received = next(number for number in gather_objects(signals.received()) if number is not None)
        again = f"the same command with run_dir={trainer.default_root_dir} continues it"
        raise signals.preempted(f"saved {path}; {again}", received, together=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All steps are done and saved; what sums them up is made up for when the run continues."""
        self._any_told.close()
        if any(gather_objects(signals.received() is not None)):
            self._leave(trainer)
