"""Optuna's samplers, each drawing for one trial: the same seed and number give the same generator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

Sampler = Literal["tpe", "cmaes", "random", "grid"]


def sampler(name: Sampler, seed: int, number: int, n_startup_trials: int, grid: list[dict[str, Any]]) -> BaseSampler:
    """The sampler of trial `number`. It does not go on from the one before, so that a sweep that was killed draws what
    it would have drawn."""
    import numpy as np
    from optuna import samplers

    mixed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    if name == "tpe":
        # Trials of a batch are apart: what is being tried counts as if it had gone badly.
        return samplers.TPESampler(n_startup_trials=n_startup_trials, seed=mixed, constant_liar=True)
    if name == "cmaes":
        return samplers.CmaEsSampler(seed=mixed, warn_independent_sampling=False)
    if name == "grid":
        return _grid(grid)
    return samplers.RandomSampler(seed=mixed)


def _grid(grid: list[dict[str, Any]]) -> BaseSampler:
    """Trial N has combination N. Optuna's own grid ends the study by itself, which only its own loop can take."""
    from optuna.samplers import BaseSampler

    class Grid(BaseSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return grid[trial.number % len(grid)][param_name]

    return Grid()
