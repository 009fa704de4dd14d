"""What ended a job, judged from how its ranks ended."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import NamedTuple

from llm.exit import BUG, INTERRUPTED, LOST

# A rank that leaves with one of these has said why: configuration, data, the run exists, storage, told to go and
# saved, lost contact, refused for safety, diverged, Ctrl-C.
_SAID = {64, 65, 73, 74, 75, LOST, 77, 79, INTERRUPTED}
_TOLD_TO_GO = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_HINTS: dict[int, str] = {
    signal.SIGKILL: (
        ", as the kernel does when memory runs out (look with `dmesg | grep -i 'out of memory'`, "
        "under SLURM with `sacct -o state,maxrss -j JOB`)"
    ),
    signal.SIGBUS: ", as happens when /dev/shm is full (look with `df /dev/shm`)",
}


class Ended(NamedTuple):
    """How a rank ended: its exit code, or minus the signal; `stopped` if the launcher had begun to kill."""

    rank: int
    pid: int
    code: int
    stopped: bool = False


class Verdict(NamedTuple):
    """The exit code of the job; what nobody else can say about it, and whether no rank could write it down."""

    code: int
    text: str | None = None
    unrecorded: bool = False
    rank: int | None = None


def judge(ended: Sequence[Ended], forwarded: Sequence[int]) -> Verdict:
    """Name the cause, given how the ranks ended, in that order, and which signals they had been sent.

    The first that failed is the cause. A rank that lost contact, or had to be killed, is a consequence; if there is
    nothing else, a rank that left as if all were done was the cause of it.
    """
    if all(end.code == 0 for end in ended):
        return Verdict(0)
    by_themselves = [end for end in ended if not end.stopped]
    failed = [end for end in by_themselves if end.code not in (0, LOST)]
    early = [end for end in by_themselves if end.code == 0]
    if failed:
        return _failed(failed, len(ended), forwarded)
    if early:
        text = f"rank {early[0].rank} left early with exit code 0, while other ranks were still at work"
        return Verdict(BUG, text, True, early[0].rank)
    return Verdict(LOST)


def _failed(failed: Sequence[Ended], n_ranks: int, forwarded: Sequence[int]) -> Verdict:
    first = failed[0]
    if first.code in _SAID:
        return Verdict(first.code)
    if first.code > 0:
        alike = sorted(end.rank for end in failed if end.code == first.code)
        who = f"rank {alike[0]}" if len(alike) == 1 else f"ranks {', '.join(map(str, alike))}"
        what = "failed" if first.code == BUG else f"left with exit code {first.code}"
        where = "its traceback is above" if len(alike) == 1 else "the traceback is above"
        return Verdict(first.code, f"{who} {what}; {where if first.code == BUG else 'the reason is above'}")
    number = -first.code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    who = f"rank {first.rank} (pid {first.pid})"
    if number in forwarded and number in (signal.SIGINT, *_TOLD_TO_GO):
        code = INTERRUPTED if number == signal.SIGINT else LOST
        return Verdict(code, f"{who} was ended by {name} before it could save", True, first.rank)
    others = "; the other ranks were stopped" if n_ranks > 1 else ""
    return Verdict(128 + number, f"{who} was killed by {name}{_HINTS.get(number, '')}{others}", True, first.rank)
