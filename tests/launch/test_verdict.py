"""Which of the ways in which ranks ended was the cause."""

from __future__ import annotations

import signal

import pytest

from llm.launch.verdict import Ended, Verdict, judge


def ends(*codes: int, stopped: int = 0) -> list[Ended]:
    """Ranks 0, 1, … in the order in which they ended; the last `stopped` of them were killed by the launcher."""
    return [Ended(rank, 100 + rank, code, rank >= len(codes) - stopped) for rank, code in enumerate(codes)]


def test_all_done() -> None:
    assert judge(ends(0, 0, 0), []) == Verdict(0)
    assert judge(ends(0, 0), [signal.SIGUSR2]) == Verdict(0)


@pytest.mark.parametrize("code", [64, 65, 73, 74, 75, 77, 79, 130])
def test_the_rank_has_said_why(code: int) -> None:
    assert judge(ends(code, code), []) == Verdict(code)
    assert judge(ends(76, code, 0), []) == Verdict(code)
    assert judge(ends(code, -9, stopped=1), []) == Verdict(code)


def test_a_lost_peer_is_a_cause_only_where_there_is_no_other() -> None:
    assert judge(ends(76, 76), []) == Verdict(76)
    assert judge(ends(76, -9, stopped=1), []) == Verdict(76)
    assert judge(ends(76, 76, 70), []).rank is None
    assert judge(ends(76, 76, 70), []).text == "rank 2 failed; its traceback is above"
    assert judge(ends(76, -11), []).text == "rank 1 (pid 101) was killed by SIGSEGV; the other ranks were stopped"


def test_bugs() -> None:
    assert judge(ends(70, 65), []) == Verdict(70, "rank 0 failed; its traceback is above")
    assert judge(ends(70, 76, 70), []).text == "ranks 0, 2 failed; the traceback is above"
    assert judge(ends(3, 0), []) == Verdict(3, "rank 0 left with exit code 3; the reason is above")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (9, "killed by SIGKILL, as the kernel does when memory runs out (look with `dmesg"),
        (7, "killed by SIGBUS, as happens when /dev/shm is full (look with `df /dev/shm`)"),
        (6, "killed by SIGABRT; the other ranks were stopped"),
        (40, "killed by signal 40; the other ranks were stopped"),
    ],
)
def test_killed(number: int, said: str) -> None:
    verdict = judge(ends(-number, 76), [])
    assert (verdict.code, verdict.unrecorded, verdict.rank) == (128 + number, True, 0)
    assert said in str(verdict.text)
    assert "other ranks" not in str(judge(ends(-number), []).text)


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 76), (1, 76), (10, 76), (12, 76), (3, 131)])
def test_ended_by_a_signal_that_was_passed_on(number: int, code: int) -> None:
    verdict = judge(ends(-number, -number), [number])
    name = signal.Signals(number).name
    assert (verdict.code, verdict.unrecorded) == (code, True)
    told_to_go = number in (2, 15, 1, 10, 12)
    assert (f"rank 0 (pid 100) was ended by {name} before it could save" == verdict.text) == told_to_go
    assert judge(ends(-number, -number), []).code == 128 + number  # somebody else sent it


def test_left_early() -> None:
    text = "rank 0 left early with exit code 0, while other ranks were still at work"
    for others in (ends(0, -9, stopped=1), ends(0, 76)):
        assert judge(others, []) == Verdict(70, text, True, 0)
    assert judge(ends(0, 65), []) == Verdict(65)
