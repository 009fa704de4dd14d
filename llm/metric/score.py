"""A figure of merit and how far chance may have moved it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_SEED = 12345  # of bootstraps, as sacrebleu's


@dataclass(frozen=True)
class Score:
    """A value and, of a bootstrap, the ends of its interval; `signature` says how it was computed."""

    value: float
    low: float | None = None
    high: float | None = None
    signature: str = ""


def bootstrapped(
    score: Callable[[np.ndarray], Sequence[float]], samples: np.ndarray, n_bootstrap: int, signature: str = ""
) -> list[Score]:
    """Each value of `score` over the samples, [n, …]; its interval is the middle 95 % of what it is over samples drawn
    from them with replacement, `n_bootstrap` times (Koehn 2004); 0: none."""
    values = score(samples)
    if not n_bootstrap or len(samples) < 2:
        return [Score(float(value), signature=signature) for value in values]
    draw, n = np.random.default_rng(_SEED), len(samples)
    drawn = np.array([score(samples[draw.integers(0, n, n)]) for _ in range(n_bootstrap)])
    ends = np.quantile(drawn, [0.025, 0.975], axis=0).T.tolist()
    return [Score(float(value), low, high, signature) for value, (low, high) in zip(values, ends, strict=True)]


def mean(values: Sequence[float], n_bootstrap: int = 0, signature: str = "") -> Score:
    """The mean of what each sample scores."""
    (found,) = bootstrapped(lambda array: [float(array.mean())], np.asarray(values, float), n_bootstrap, signature)
    return found
