"""What becomes of a run whose gradient is not a number, or whose loss leaps: it stops, skips the batch, or goes back.

A batch that is left out still makes a step, without an update: batch N stays that of step N + 1, whatever happened.
All processes judge by the same numbers, those of the whole step, so they decide the same.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt


class DivergedError(Exception):
    """The run cannot go on by itself."""

    exit_code = 79


@dataclass(frozen=True)
class Window:
    """The batches `first` to `last`, which are left out from now on: at `step`, `cause` was found."""

    step: int
    cause: str
    first: int
    last: int


class RollBackError(Exception):
    """The run is to go back to a checkpoint, and to leave out the batches of `window`."""

    def __init__(self, window: Window) -> None:
        super().__init__(f"step {window.step}: {window.cause}")
        self.window = window


class Guard:
    """Looks at the loss and the gradient's norm of every step, and remembers the losses of the last ones.

    Args:
        sigma: a loss is a spike if it lies so many standard deviations above the mean of the last `history` steps;
            null: none is.
        history: steps; before there are so many, no loss is a spike.
    """

    before_update: ClassVar[bool] = False  # whether a step waits for the judgement

    def __init__(self, sigma: Annotated[float, Gt(0)] | None, history: Annotated[int, Ge(2)]) -> None:
        self.sigma = sigma
        self.losses: deque[float] = deque(maxlen=history)
        self.left_out: set[int] = set()  # batches that make a step without an update
        self.gone_back: Window | None = None  # why this run has just gone back

    def leave_out(self, window: Window) -> None:
        """The run has gone back because of these batches."""
        self.gone_back = window
        self.left_out |= set(range(window.first, window.last + 1))

    def judge(self, norm: float, loss: float | None) -> str | None:
        """What is wrong with a step whose gradient has this norm; None if nothing is.

        Args:
            norm: L2, before clipping.
            loss: mean over the step; None where `sigma` is.
        """
        if not math.isfinite(norm):
            return "the gradient is not finite"
        if loss is None:
            return None
        if not math.isfinite(loss):
            return "the loss is not finite"
        if self.sigma is not None and len(self.losses) == self.losses.maxlen:
            mean, deviation = statistics.fmean(self.losses), statistics.pstdev(self.losses)
            if loss > mean + self.sigma * deviation:
                return f"the loss is {loss:.4f}, beyond {self.sigma:g} standard deviations from {mean:.4f}"
        self.losses.append(loss)
        return None

    def respond(self, step: int, cause: str) -> Exception | None:
        """What to raise after `step`; None goes on."""
        raise AssertionError(f"{type(self).__name__} has to say what becomes of the run")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on judging by, and leaves out."""
        return {"losses": list(self.losses), "left_out": sorted(self.left_out)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The other half; what this run has learnt to leave out since stays so."""
        self.losses.clear()
        self.losses.extend(state_dict["losses"])
        self.left_out |= set(state_dict["left_out"])


class Stop(Guard):
    """The run ends, with exit code 79; the checkpoint before is good. See `Guard` for `sigma` and `history`."""

    def __init__(self, sigma: Annotated[float, Gt(0)] | None = None, history: Annotated[int, Ge(2)] = 128) -> None:
        super().__init__(sigma, history)

    def respond(self, step: int, cause: str) -> Exception | None:
        look = f"python -m llm audit RUN --step {step} shows its text"
        return DivergedError(f"step {step}: {cause} - {look}; guard=skip or guard=rollback goes on")


class Skip(Guard):
    """The update is not made, and the run goes on. Every step waits for the device, to be judged before its update.

    Args:
        sigma, history: see `Guard`.
        in_a_row: after so many skipped steps, one after the other, the run ends with exit code 79.
    """

    before_update = True

    def __init__(
        self,
        sigma: Annotated[float, Gt(0)] | None = 6.0,
        history: Annotated[int, Ge(2)] = 128,
        in_a_row: Annotated[int, Gt(0)] = 5,
    ) -> None:
        super().__init__(sigma, history)
        self.in_a_row = in_a_row
        self._skipped: list[int] = []  # one after the other

    def respond(self, step: int, cause: str) -> Exception | None:
        self._skipped = [*(self._skipped if self._skipped[-1:] == [step - 1] else []), step]
        if len(self._skipped) < self.in_a_row:
            return None
        return DivergedError(f"steps {self._skipped[0]} to {step} were skipped one after the other: {cause}")

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "skipped": list(self._skipped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._skipped = list(state_dict.get("skipped", []))


class RollBack(Guard):
    """The run goes back to the last checkpoint before the window of batches that ends with the bad one, and leaves them
    out (as Chowdhery et al. 2022, arXiv:2204.02311, section 5.1).

    Args:
        sigma, history: see `Guard`.
        window: batches.
        attempts: how often the run may go back to the same checkpoint; then it ends with exit code 79.
    """

    def __init__(
        self,
        sigma: Annotated[float, Gt(0)] | None = 6.0,
        history: Annotated[int, Ge(2)] = 128,
        window: Annotated[int, Gt(0)] = 8,
        attempts: Annotated[int, Gt(0)] = 3,
    ) -> None:
        super().__init__(sigma, history)
        self.window = window
        self.attempts = attempts

    def respond(self, step: int, cause: str) -> Exception | None:
        return RollBackError(Window(step, cause, max(0, step - self.window), step - 1))
