"""No hang goes unnoticed."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import signal
import subprocess
from pathlib import Path
from typing import Annotated, Any, TextIO

import lightning as L
from annotated_types import Gt
from lightning.pytorch.callbacks import Callback

from llm.guard import RollBackError
from llm.launch import place
from llm.watch import Heart, start_sidecar
from llm.watch.sidecar import FOLDER, stacks_path

log = logging.getLogger(__name__)


class Watchdog(Callback):
    """When a step takes longer than max(floor_s, factor x the median step), a process beside the ranks of each node
    writes the stacks of all ranks to `RUN/hang.txt`, names the late one, and ends the run with exit code 76.

    The first step, validations, samples and saves may take as long as they like, and the time in which all ranks are
    suspended does not count. `kill -QUIT` of a rank writes its stacks to `RUN/.watch/` at any time.

    Args:
        floor_s: no step is too long before.
        factor: nor before so many times the median.
    """

    def __init__(self, floor_s: Annotated[float, Gt(0)] = 30.0, factor: Annotated[float, Gt(1)] = 10.0) -> None:
        self.floor_s = floor_s
        self.factor = factor
        self._heart: Heart | None = None
        self._sidecar: subprocess.Popen[bytes] | None = None
        self._stacks: TextIO | None = None
        self._warm = False  # the first step of a process may compile

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before there are loader workers, which inherit how to show a stack."""
        here, run_dir = place(), Path(trainer.default_root_dir)
        try:
            self._heart = Heart(run_dir / FOLDER, here.rank)
            self._stacks = open(stacks_path(run_dir / FOLDER, here.rank), "w")  # noqa: SIM115
        except OSError as error:
            log.warning("callback.watchdog: hangs will not be noticed: %s", error)
            return
        faulthandler.register(signal.SIGQUIT, self._stacks, all_threads=True)
        self._warm = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on the sidecar looks."""
        here = place()
        if here.local_rank == 0 and self._heart is not None:
            self._sidecar = start_sidecar(Path(trainer.default_root_dir), here, self.floor_s, self.factor)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch has come."""
        if self._heart is not None and self._warm:
            self._heart.work()

    def on_before_backward(self, *arguments: Any) -> None:
        """Of every micro-batch."""
        self._beat()

    def on_after_backward(self, *arguments: Any) -> None:
        """After the last one, gradients have travelled."""
        self._beat()

    def on_before_optimizer_step(self, *arguments: Any) -> None:
        """The gradient's norm is known."""
        self._beat()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The next batch is waited for as part of the next step."""
        self._warm = True
        if self._heart is not None:
            self._heart.complete_step()
            self._heart.work()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """No step until the next batch."""
        self._rest()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """No step until the next batch."""
        self._rest()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All steps are made."""
        self._rest()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """What comes next is no step. A run that goes back begins again with a sidecar of its own; of one that ends the
        other ranks may hang, and are looked at."""
        if isinstance(exception, RollBackError):
            self._stop()
        self._rest()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nobody looks any more."""
        self._stop()

    def _stop(self) -> None:
        self._rest()
        if self._sidecar is not None:
            self._sidecar.kill()
            self._sidecar.wait()
        if self._stacks is not None:
            faulthandler.unregister(signal.SIGQUIT)
            with contextlib.suppress(OSError):
                self._stacks.close()
        self._heart = self._sidecar = self._stacks = None

    def _beat(self) -> None:
        if self._heart is not None:
            self._heart.beat()

    def _rest(self) -> None:
        if self._heart is not None:
            self._heart.rest()
