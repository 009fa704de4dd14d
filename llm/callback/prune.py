"""A job of a sweep that falls behind ends before its time."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import lightning as L
from annotated_types import Ge
from lightning.pytorch.callbacks import Callback

from llm.study import Reports

_log = logging.getLogger(__name__)


class Prune(Callback):
    """Report the sweep's metric at each validation, and end the run, on all processes, when its study says so: with
    exit code 0, a checkpoint, and `pruned` in summary.json.

    The sweep adds this callback to its jobs. The first process alone talks with the study; if it cannot, the run goes
    on.

    Args:
        storage: the study's file.
        study: its name.
        trial: the job's number in it.
    """

    def __init__(self, storage: str, study: str, trial: Annotated[int, Ge(0)]) -> None:
        self.storage = storage
        self.study = study
        self.trial = trial
        self.pruned_at: int | None = None
        self._reports: Reports | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All processes are here; none trains on before it knows."""
        if trainer.sanity_checking:
            return
        hopeless = trainer.is_global_zero and self._told(trainer)
        if trainer.strategy.broadcast(hopeless) and trainer.global_step < trainer.max_steps:
            self.pruned_at = trainer.global_step
            trainer.should_stop = True

    def _told(self, trainer: L.Trainer) -> bool:
        """Whether the study has given this job up. A file that cannot be read costs a report, not the run."""
        try:
            self._reports = self._reports or Reports(self.storage, self.study, self.trial)
            name, values = self._reports.pruning.metric, trainer.callback_metrics
            if name not in values:
                _log.warning("callback.prune: %s was not measured, there is %s", name, ", ".join(_validated(values)))
                return False
            self._reports.report(trainer.global_step, float(values[name]))
            return self._reports.hopeless(trainer.global_step)
        except Exception as error:  # Optuna's, the file system's, a lock's
            _log.warning("callback.prune: %s was not told of step %d (%s)", self.storage, trainer.global_step, error)
            return False


def _validated(values: dict[str, Any]) -> list[str]:
    return [name for name in values if name.startswith("val/")]
