"""Lightning's fit loop, as long as a run here lasts, and a step that costs what it must."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.profilers import PassThroughProfiler


class FitLoop(_FitLoop):
    """A run that was interrupted when all its steps were made still has its end to come: the last validation, the
    curves, the summary. Lightning would return at once."""

    @property
    def skip(self) -> bool:
        return False


class EpochLoop(_TrainingEpochLoop):
    """One batch, one step, for an objective that optimises by itself.

    As Lightning's, without what only other kinds of training need: each hook is called only where somebody has one, and
    results that were logged are looked at only if there are any. A trainer with a profiler takes Lightning's way,
    whose parts profilers know by name.
    """

    def advance(self, data_fetcher: Any) -> None:
        """Fetch a batch, train on it, tell all who listen."""
        trainer: Any = self.trainer
        if self.restarting or not isinstance(trainer.profiler, PassThroughProfiler):
            super().advance(data_fetcher)
            return
        strategy, module = trainer.strategy, trainer.lightning_module
        self.val_loop.restarting = False
        batch, _, _ = next(data_fetcher)
        progress, index = self.batch_progress, self.batch_idx + 1
        progress.is_last_batch = data_fetcher.done
        batch = module.on_before_batch_transfer(batch, 0).to(strategy.root_device)
        progress.increment_ready()
        trainer._logger_connector.on_batch_start(batch)
        strategy.hooks("on_train_batch_start", batch, index)
        progress.increment_started()
        self.manual_optimization.on_run_start()
        strategy.training_step(batch, index)
        self.manual_optimization.on_run_end()
        progress.increment_processed()
        strategy.hooks("on_train_batch_end", {}, batch, index)
        if self._results:
            trainer._logger_connector.on_batch_end()
        progress.increment_completed()
        if self._results:
            trainer._logger_connector.update_train_step_metrics()

    def _broadcast_sigterm_tensor(self) -> None:
        """Lightning asks in every batch, by a collective for which it waits, whether somebody was told to go."""
