"""An Optuna study in a file: what a sweep's processes share, and its jobs report to.

Optuna is imported only where a study is opened: `pip install -e '.[sweep]'`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.storages import BaseStorage

Pruner = Literal["none", "median", "asha"]
_PRUNING = "pruning"  # attribute of a study: what jobs need to know to judge themselves
_PRUNED = "pruned_at"  # attribute of a trial: a job that was told so, and then interrupted, is told so again


@dataclass(frozen=True)
class Pruning:
    """Which jobs are ended before their time: those whose `metric` is worse than the median of the others at that step,
    or that are not among the best 1 / reduction_factor at a rung (ASHA: Li et al. 2020, arXiv:1810.05934)."""

    metric: str
    pruner: Pruner
    n_startup_trials: int
    warmup_steps: int
    reduction_factor: int

    def write(self, study: Any) -> None:
        """Leave it in the study, where jobs find it."""
        study.set_user_attr(_PRUNING, asdict(self))

    def built(self) -> BasePruner:
        """Optuna's."""
        from optuna.pruners import MedianPruner, NopPruner, SuccessiveHalvingPruner

        if self.pruner == "median":
            return MedianPruner(self.n_startup_trials, self.warmup_steps)
        if self.pruner == "asha":
            return SuccessiveHalvingPruner(max(1, self.warmup_steps), self.reduction_factor)
        return NopPruner()


class Reports:
    """What one job tells its study, and is told."""

    def __init__(self, storage: str | Path, study: str, number: int) -> None:
        from optuna import load_study
        from optuna.trial import Trial

        self._study = load_study(study_name=study, storage=opened(storage))
        self.pruning = Pruning(**self._study.user_attrs[_PRUNING])
        self._study.pruner = self.pruning.built()
        self._trial = Trial(self._study, self._study.get_trials(deepcopy=False)[number]._trial_id)
        self._reported = set(self._study.get_trials()[number].intermediate_values)

    def report(self, step: int, value: float) -> None:
        """The metric at a step, once: a job that was interrupted measures some steps again."""
        if step not in self._reported:
            self._trial.report(value, step)
            self._reported.add(step)

    def hopeless(self, step: int) -> bool:
        """Whether the job should end here; the answer stays, whatever becomes of the job."""
        if _PRUNED not in self._trial.user_attrs and self._trial.should_prune():
            self._trial.set_user_attr(_PRUNED, step)
        return _PRUNED in self._trial.user_attrs


def opened(path: str | Path) -> BaseStorage:
    """The storage in a file, which is made if it is not there; its lock works on network file systems, too."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return JournalStorage(JournalFileBackend(str(path)))


def finite(value: Any) -> bool:
    """Whether a metric is a number that can be compared."""
    return isinstance(value, (int, float)) and math.isfinite(value)
