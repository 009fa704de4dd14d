"""Learning-rate schedules: a pure function from the step to a factor of the peak learning rate.

Every schedule rises linearly over `warmup_steps` and never reads a clock or a history, so a resumed run continues it
exactly.
A run's length is `trainer.max_steps`; it may be None only until the run has worked it out from tokens or epochs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Interval


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then whatever `after_warmup` says."""

    warmup_steps: Annotated[int, Ge(0)]

    def __call__(self, step: int) -> float:
        """Factor for the optimizer step number `step`, the first being 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return self.after_warmup(step)

    def after_warmup(self, step: int) -> float:
        """Factor once the warm-up is over; 1 at its first step."""
        raise AssertionError(f"{type(self).__name__} has to say how it goes on after the warm-up")


@dataclass(frozen=True)
class Constant(Schedule):
    """The peak rate until the end."""

    def after_warmup(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class InverseSquareRoot(Schedule):
    """sqrt(warmup_steps / step), the schedule of Vaswani et al. 2017 (arXiv:1706.03762, section 5.3); needs no end."""

    def after_warmup(self, step: int) -> float:
        start = max(1, self.warmup_steps)
        return math.sqrt(start / max(start, step))


@dataclass(frozen=True)
class _Decay(Schedule):
    """A schedule that ends at `final_factor` on the last step of the run."""

    max_steps: Annotated[int, Gt(0)] | None
    final_factor: Annotated[float, Interval(ge=0, le=1)] = 0.0

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"schedule.warmup_steps: {self.warmup_steps} - must be below trainer.max_steps={self.max_steps} - "
                f"try schedule.warmup_steps={self.max_steps // 10}"
            )

    def progress(self, step: int, start: int) -> float:
        """How far `step` lies between `start` (0) and the last step of the run (1)."""
        assert self.max_steps is not None, "run.py works out max_steps before anything calls a schedule"
        return min(1.0, max(0.0, (step - start) / max(1, self.max_steps - 1 - start)))

    def fall(self, shape: float) -> float:
        """From 1 (shape 1) to final_factor (shape 0)."""
        return self.final_factor + (1 - self.final_factor) * shape


@dataclass(frozen=True)
class Cosine(_Decay):
    """Half a cosine from the peak to `final_factor` (Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts)."""

    def after_warmup(self, step: int) -> float:
        return self.fall(0.5 * (1 + math.cos(math.pi * self.progress(step, self.warmup_steps))))


@dataclass(frozen=True)
class Linear(_Decay):
    """A straight line to `final_factor`; to zero it beats a cosine to 10 % (Bergsma et al. 2025, arXiv:2502.15938)."""

    def after_warmup(self, step: int) -> float:
        return self.fall(1 - self.progress(step, self.warmup_steps))


@dataclass(frozen=True)
class WarmupStableDecay(_Decay):
    """Constant, then linear over the last `decay_share` of the run (Hu et al. 2024, arXiv:2404.06395)."""

    decay_share: Annotated[float, Interval(gt=0, le=1)] = 0.2

    def after_warmup(self, step: int) -> float:
        assert self.max_steps is not None, "run.py works out max_steps before anything calls a schedule"
        start = max(self.warmup_steps, round(self.max_steps * (1 - self.decay_share)))
        return self.fall(1 - self.progress(step, start))
