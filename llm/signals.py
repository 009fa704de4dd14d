"""Being told to go: SIGTERM, SIGUSR1, SIGUSR2, SIGHUP (a closed terminal), and Ctrl-C while a run trains.

A signal is kept until somebody asks. The handler never saves, which is what makes stock trainers hang; while a run
trains, `callback.Preempt` asks after every step. Only where there is nothing to save, and nobody waits for this
process, the handler itself raises: while data is prepared, and when all is saved and W&B takes its time.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, Literal

from llm.exit import SAVED

TOLD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

_owner = 0  # the process that listens: a fork of it inherits the handler, not the duty
_then: Literal["keep", "raise", "ignore"] = "keep"
_received: signal.Signals | None = None


class PreemptedError(SystemExit):
    """The run was told to go, and nothing is lost. `exit_code` is 75, and 130 after Ctrl-C; `together` if all processes
    raise this, after the same step.

    No `except Exception` of a library may take it for something that went wrong; where nobody catches it, it ends the
    process with that code.
    """

    def __init__(self, message: str, exit_code: int = SAVED, *, together: bool = False) -> None:
        super().__init__(exit_code)
        self.message = message
        self.exit_code = exit_code
        self.together = together

    def __str__(self) -> str:
        return self.message


def listen() -> None:
    """At the very start of a process, before anything heavy is imported; what a launcher held back comes now."""
    global _owner
    _owner = os.getpid()
    _hear(TOLD)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TOLD)


def begin() -> None:
    """A run begins: signals are kept."""
    global _then
    _then = "keep"


def raise_at_once() -> None:
    """From now on there is nothing to save, and nobody to wait for.

    Raises:
        PreemptedError: also for a signal that was kept.
    """
    global _then
    _then = "raise"
    if _received is not None:
        raise preempted("nothing is left to be saved; the same command continues", _received)


def preempted(what: str, number: signal.Signals, *, together: bool = False) -> PreemptedError:
    """What to raise when all is done that there was to do; further signals change nothing."""
    global _then, _received
    _then, _received = "ignore", None
    return PreemptedError(f"{number.name}: {what}", 130 if number == signal.SIGINT else SAVED, together=together)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """In the body signals are kept, Ctrl-C too, also in a process that did not `listen`."""
    global _owner
    _owner = os.getpid()
    begin()
    before = _hear((signal.SIGINT, *TOLD))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """In the body nobody asks: a signal ends the process as it ends any program."""
    before = {number: signal.getsignal(number) for number in TOLD if signal.getsignal(number) is _note}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore() -> None:
    """The run has ended, and that is on record: there is nothing left to be told, until the next one begins."""
    global _then
    _then = "ignore"


def deaf() -> None:
    """For a helper of a run, whose process group may be signalled as a whole: the run sees to it."""
    for number in (signal.SIGINT, *TOLD):
        signal.signal(number, signal.SIG_IGN)


def received() -> signal.Signals | None:
    """The signal that is kept, if any."""
    return _received


def _hear(numbers: tuple[signal.Signals, ...]) -> dict[int, Any]:
    """Handle these, but for those that are ignored, as under nohup; gives what handled them before."""
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, _note) for number in heard}


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    if os.getpid() != _owner:
        if _then == "raise":  # a helper of the preparation; loader workers see to themselves
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    if _then == "ignore":
        return
    if _received is signal.SIGINT and number == signal.SIGINT:
        os._exit(130)
    _received = signal.Signals(number)
    if _then == "raise":
        raise preempted("nothing is left to be saved; the same command continues", _received)
