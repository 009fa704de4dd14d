"""A run that is told to go saves first."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from llm.callback.checkpoint import save_step
from llm.reduce import AnyRaised, gather_objects

_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75}


class PreemptedError(Exception):
    """The run was told to stop, and saved. `exit_code` is 75 after SIGTERM, SIGUSR1 or SIGHUP, 130 after Ctrl-C."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Preempt(Callback):
    """SIGTERM, SIGUSR1, SIGHUP (a closed terminal) or Ctrl-C: finish the step, save, leave; a second Ctrl-C leaves.

    The handler only sets a flag: saving inside a signal handler is what makes stock trainers hang. One process that was
    told is enough: all of them learn it, and stop after the same step.
    """

    def __init__(self) -> None:
        self._any_told = AnyRaised()
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listen from here on: whoever is told while the network is built saves after the first step."""
        self._any_told, self._received = AnyRaised(), None
        self._owner = os.getpid()
        heard = [number for number in _EXIT_CODES if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores
        self._previous = {number: signal.signal(number, self._note) for number in heard}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and leave, between two steps, where a run can be continued exactly."""
        self._leave_if_told(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Validation lies between two steps too, and may be long; it is made up for when the run continues."""
        self._leave_if_told(trainer)

    def _leave_if_told(self, trainer: L.Trainer) -> None:
        if self._any_told(self._received is not None):
            path = save_step(trainer)
            received = next(number for number in gather_objects(self._received) if number is not None)
            again = f"the same command with run_dir={trainer.default_root_dir} continues it"
            raise PreemptedError(f"{received.name}: saved {path}; {again}", _EXIT_CODES[received])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The run is done all the same, and saved."""
        self._any_told.close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked loader worker inherits the handler, not the duty
            return
        if self._received is signal.SIGINT and number == signal.SIGINT:
            os._exit(130)
        self._received = signal.Signals(number)
