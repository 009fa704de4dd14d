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

    @property
    def global_step(self) -> int:
        """Optimizer steps of the whole run: every callback asks, and Lightning looks first whether it counts itself."""
        steps: int = self.manual_optimization.optim_step_progress.total.completed
        return steps

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
        self._open_results(batch)
        strategy.hooks("on_train_batch_start", batch, index)
        progress.increment_started()
        strategy.training_step(batch, index)
        steps = self.manual_optimization.optim_step_progress  # the optimizer has made one, whatever became of it
        steps.increment_ready()
        steps.increment_completed()
        progress.increment_processed()
        strategy.hooks("on_train_batch_end", {}, batch, index)
        if self._results:
            trainer._logger_connector.on_batch_end()
        progress.increment_completed()
        if self._results:
            trainer._logger_connector.update_train_step_metrics()

    def _open_results(self, batch: Any) -> None:
        """What `self.log` reads of the step; Lightning's connector goes a long way to find these results."""
        connector: Any = self.trainer._logger_connector
        connector._first_loop_iter = connector._first_loop_iter is None
        self._results.batch, self._results.batch_size, self._results.dataloader_idx = batch, None, None

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        """Lightning looks in every step whether there is anything to validate on: here only where it may be due."""
        trainer: Any = self.trainer
        interval = trainer.val_check_batch
        anything_else = trainer.should_stop or self.batch_progress.is_last_batch or self.restarting
        by_steps = isinstance(interval, int) and trainer.check_val_every_n_epoch is None
        if by_steps and not anything_else and (self.total_batch_idx + 1) % interval:
            return trainer._val_check_time_interval is not None and super()._should_check_val_fx(data_fetcher)
        return super()._should_check_val_fx(data_fetcher)

    def update_lr_schedulers(self, interval: str, update_plateau_schedulers: bool) -> None:
        """The objective sets the rate; Lightning would look in every step whether it accumulates."""
        if self.trainer.strategy.lr_scheduler_configs:
            super().update_lr_schedulers(interval, update_plateau_schedulers)

    def _broadcast_sigterm_tensor(self) -> None:
        """Lightning asks in every batch, by a collective for which it waits, whether somebody was told to go."""
